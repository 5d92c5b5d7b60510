"""Streaming: a streamer gets every token, in bursts of as many as a round accepts."""

from _targets import chat_inputs, example_arguments, load_draft, load_target
from transformers import TextStreamer


arguments = example_arguments(__doc__).parse_args()
target, tokenizer = load_target(arguments.tiny)
draft = load_draft(target, arguments.tiny)
inputs = chat_inputs(target, tokenizer, "Write a short poem about the sea.")

streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
target.generate(**inputs, assistant_model=draft, streamer=streamer, max_new_tokens=96)
print(draft.last_statistics)
