"""
Replace a draft's mixtures of experts by the one embedding each that comes nearest: the mean of what they gave.

The mean is over a few rows of data, as training reads them. It is what an ablation without mixtures starts from where
a contemplation warm-up of its own would take too long.

    python examples/fold_mixtures.py DRAFT runs/folded --data answers.jsonl.gz
"""

import argparse
import copy
import tempfile
from itertools import islice

import torch
from _targets import example_arguments, load_target

from transformers_confu import ConFuDraftModel
from transformers_confu.common.loading import default_device
from transformers_confu.data import load_rows, prepare_dataset
from transformers_confu.training import ConFuTrainer, ConFuTrainingArguments


MIXTURES = ("contemplate_token", "future_token")

parser = example_arguments(__doc__)
parser.formatter_class = argparse.RawDescriptionHelpFormatter
parser.add_argument("draft", help="folder or Hub id")
parser.add_argument("output", help="folder of the new draft")
parser.add_argument("--data", required=True, help="rows that `prepare_dataset` reads")
parser.add_argument("--rows", type=int, default=32, help="so many rows, spread over the data")
arguments = parser.parse_args()

target, tokenizer = load_target(arguments.tiny)
draft = ConFuDraftModel.from_pretrained(arguments.draft, dtype=torch.float32)
rows = list(load_rows(arguments.data))
rows = list(islice(rows, 0, None, max(1, len(rows) // arguments.rows)))

sums = {name: torch.zeros(()) for name in MIXTURES}
counts = dict.fromkeys(MIXTURES, 0)


def add_to(name: str):
    def hook(mixture, inputs, embeddings: torch.Tensor) -> None:
        vectors = embeddings.detach().flatten(end_dim=-2).cpu()  # (rows, size)
        sums[name] = sums[name] + vectors.sum(dim=0)
        counts[name] += len(vectors)

    return hook


for name in MIXTURES:
    draft.future_channel.get_submodule(name).register_forward_hook(add_to(name))
dataset = prepare_dataset(rows, tokenizer, draft.config.max_position_embeddings, vocab_size=target.vocab_size)
with tempfile.TemporaryDirectory() as folder:
    ConFuTrainer(
        model=draft,
        target_model=target,
        args=ConFuTrainingArguments(output_dir=folder, tokens_per_batch=1, use_cpu=default_device() == "cpu"),
        eval_dataset=dataset,
    ).evaluate()

config = copy.deepcopy(draft.config)
for mixture in ("contemplate", "future"):
    setattr(config, f"num_{mixture}_experts", 1)
    setattr(config, f"num_{mixture}_experts_per_token", 1)
folded = ConFuDraftModel(config)
routed = ("router.weight", "experts")
kept = {name: tensor for name, tensor in draft.state_dict().items() if not name.endswith(routed)}
folded.load_state_dict(kept, strict=False)
with torch.no_grad():
    for name in MIXTURES:
        mixture = folded.future_channel.get_submodule(name)
        mixture.experts.copy_(sums[name] / counts[name])
        mixture.router.weight.zero_()  # one expert has probability 1 whatever it says
folded.generation_config = draft.generation_config
folded.save_pretrained(arguments.output)
for name in MIXTURES:
    print(f"{name}: the mean of {counts[name]:,} embeddings")
