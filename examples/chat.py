"""
A chat of three turns. The cache of one turn is passed to the next, so no turn is computed twice; the draft's own state
travels on it ("draft state carried"). `confu chat` is the same in the terminal, with your own questions.
"""

from _targets import example_arguments, load_draft, load_target
from transformers import TextStreamer

from transformers_confu.commands.chat import Chat


arguments = example_arguments(__doc__).parse_args()
target, tokenizer = load_target(arguments.tiny)
chat = Chat(target, tokenizer, load_draft(target, arguments.tiny))
streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

for question in ("What is a prime number?", "Name five of them.", "Is 1 one of them?"):
    print(f"\n> {question}")
    chat.ask(question, streamer, max_new_tokens=96)
    print(f"[{chat.draft.last_statistics}]")
