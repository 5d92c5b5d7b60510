"""
Turn a trained draft into the folder that is published: weights in bf16, knobs of decoding in `generation_config.json`,
no optimiser state.

    python examples/train_smollm2/ship.py runs/joint hub_cards/confu-smollm2-135m-instruct --tree-size 16 ...
"""

import argparse

import torch
from transformers import GenerationConfig

from transformers_confu import ConFuDraftModel


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("draft", help="folder of the trained draft")
parser.add_argument("output", help="folder to publish")
for name, meaning in (
    ("tree-size", "nodes of the tree, the root included"),
    ("depth", "longest path of drafted tokens; at most the steps it was trained for"),
    ("branching", "nodes expanded per level, and children of each"),
    ("contemplation", "contemplate rows per round"),
):
    parser.add_argument(f"--{name}", type=int, required=True, help=meaning)
arguments = parser.parse_args()

draft = ConFuDraftModel.from_pretrained(arguments.draft, dtype=torch.bfloat16)
draft.generation_config = GenerationConfig(
    confu_tree_size=arguments.tree_size,
    confu_depth=arguments.depth,
    confu_branching=arguments.branching,
    confu_contemplation=arguments.contemplation,
)
draft.save_pretrained(arguments.output)
print(f"{arguments.output}: {sum(parameter.numel() for parameter in draft.parameters()) / 1e6:.1f} million parameters")
