"""A pipeline with a draft. `assistant_model` may also be the name of a draft, where this package is imported."""

from _targets import example_arguments, load_draft, load_target
from transformers import pipeline


arguments = example_arguments(__doc__).parse_args()
target, tokenizer = load_target(arguments.tiny)
draft = load_draft(target, arguments.tiny)

generator = pipeline("text-generation", model=target, tokenizer=tokenizer, assistant_model=draft)
chat = [{"role": "user", "content": "Give me three ideas for a rainy afternoon."}]
answer = generator(chat, max_new_tokens=64, do_sample=False)
print(answer[0]["generated_text"][-1]["content"])
print(draft.last_statistics)
