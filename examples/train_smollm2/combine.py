"""
Put the core of one draft and the future channel of another together, where they were trained apart:

    python examples/train_smollm2/combine.py runs/core runs/warm_up runs/start
"""

import argparse

import torch

from transformers_confu import ConFuDraftModel
from transformers_confu.training.arguments import parameter_group


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("core", help="draft whose core and draft vocabulary are taken")
parser.add_argument("channel", help="draft whose future channel is taken, and the rest of its configuration")
parser.add_argument("output", help="folder of the new draft")
arguments = parser.parse_args()
core = ConFuDraftModel.from_pretrained(arguments.core, dtype=torch.float32)
draft = ConFuDraftModel.from_pretrained(arguments.channel, dtype=torch.float32)
draft.load_state_dict({n: t for n, t in core.state_dict().items() if parameter_group(n) == "core"}, strict=False)
draft.save_pretrained(arguments.output)
