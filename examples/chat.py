"""
A chat in the terminal. The cache of one turn is passed to the next, so no turn is computed twice; the draft's own
state travels on it ("draft state carried"). An empty line ends the chat.
"""

import torch
from _targets import example_arguments, load_draft, load_target
from transformers import DynamicCache, TextStreamer


SCRIPT = ["What is a prime number?", "Name five of them.", "Is 1 one of them?"]

parser = example_arguments(__doc__)
parser.add_argument("--script", action="store_true", help="ask three given questions and end")
arguments = parser.parse_args()
target, tokenizer = load_target(arguments.tiny)
draft = load_draft(target, arguments.tiny)


def render(messages: list[dict[str, str]]) -> str:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def encode(text: str) -> torch.Tensor:
    return tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].to(target.device)


def questions():
    while question := input("\n> "):
        yield question


messages: list[dict[str, str]] = []
written = ""  # what the template has made of the messages so far, the last answer included
ids = torch.empty(1, 0, dtype=torch.long, device=target.device)
cache = DynamicCache()
streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
for question in SCRIPT if arguments.script else questions():
    if arguments.script:
        print(f"\n> {question}")
    # Earlier turns keep the ids that the target chose: to tokenise their text again could give others, which the
    # cache does not hold. Only what the template puts between the last answer and the next one is new.
    messages.append({"role": "user", "content": question})
    prompt = render(messages)
    ids = torch.cat([ids, encode(prompt[len(written) :])], dim=1)

    sequences = target.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        assistant_model=draft,
        streamer=streamer,
        max_new_tokens=96,
    )
    answer_ids = sequences[0, ids.shape[1] :]
    answer = tokenizer.decode(answer_ids, skip_special_tokens=True)
    print(f"[{draft.last_statistics}]")
    messages.append({"role": "assistant", "content": answer})
    written = prompt + answer
    # The template writes the token that ends a turn itself.
    ids = sequences[:, :-1] if answer_ids[-1] == tokenizer.eos_token_id else sequences
