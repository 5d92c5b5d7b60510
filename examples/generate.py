"""The shortest use: one more argument to `generate`. Then the same text in another way, and with other knobs."""

import torch
from _targets import chat_inputs, example_arguments, load_draft, load_target

from transformers_confu import ConFuGenerate, confu_generation_config


arguments = example_arguments(__doc__).parse_args()
target, tokenizer = load_target(arguments.tiny)
draft = load_draft(target, arguments.tiny)
inputs = chat_inputs(target, tokenizer, "Explain in three sentences why the sky is blue.")

# Importing transformers_confu has taught `generate` to decode with a ConFu draft; nothing else changes.
sequences = target.generate(**inputs, assistant_model=draft, max_new_tokens=64)
print(tokenizer.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

# tau: tokens per forward of the target. Plain generate has 1.
print(draft.last_statistics)

# Sampling takes the same options as ever, and a seed gives the text that plain generate writes with it.
torch.manual_seed(0)
target.generate(**inputs, assistant_model=draft, max_new_tokens=64, do_sample=True, temperature=0.7, top_p=0.9)

# The same engine through Transformers' documented hook for decoding methods.
again = target.generate(**inputs, custom_generate=ConFuGenerate(draft), max_new_tokens=64)
print("custom_generate gives the same text:", torch.equal(sequences, again))

# Knobs travel in a generation config. Small trees pay on a CPU, larger ones on a GPU.
config = confu_generation_config(target, max_new_tokens=64, confu_tree_size=8, confu_contemplation=2)
target.generate(**inputs, assistant_model=draft, generation_config=config)
print(f"with a tree of 8 nodes, 2 of them contemplated: tau {draft.last_statistics.tau:.2f}")
