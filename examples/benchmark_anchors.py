"""
What anchors save: memory and time of one joint training step with a contemplate row at sampled anchors (N + K rows of
the target for a text of N tokens), and with one behind every token (2N rows).

    python examples/benchmark_anchors.py --lengths 256 512 1024

Memory is the peak over forward and backward of all tensors that the step makes; weights and gradients are not among
them. Time is the median of several steps.
"""

import argparse
import time
from statistics import median

import torch
from _targets import example_arguments, load_draft, load_target
from recipes.estimate import LiveMemory

from transformers_confu import ConFuDraftModel
from transformers_confu.evaluation.machine import synchronise
from transformers_confu.inference.target import TargetRunner
from transformers_confu.training.anchors import Anchors, sample_anchors
from transformers_confu.training.batch import Texts
from transformers_confu.training.objective import Recipe, compute_live


def measure(
    runner: TargetRunner, draft: ConFuDraftModel, texts: Texts, anchors: Anchors, arguments: argparse.Namespace
) -> tuple[float, float]:
    """Peak memory in MiB and median seconds."""

    def step() -> float:
        synchronise(draft.device)
        started = time.perf_counter()
        compute_live(draft, runner, texts, anchors, Recipe(arguments.ttt_steps, decay=0.8)).loss_sum.backward()
        synchronise(draft.device)
        return time.perf_counter() - started

    step()  # from now on the gradients have their place
    with LiveMemory(runner.target, draft) as memory:
        step()
    return memory.most / 2**20, median(step() for _ in range(arguments.repeats))


parser = example_arguments(__doc__)
parser.formatter_class = argparse.RawDescriptionHelpFormatter
parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024], help="tokens of the text, N")
parser.add_argument("--replication", type=int, default=4, help="an anchor for every so many rows + 1")
parser.add_argument("--ttt_steps", type=int, default=6)
parser.add_argument("--rotate_soft_prompts", action="store_true", help="K sets of soft prompts in place of one")
parser.add_argument("--repeats", type=int, default=3)
arguments = parser.parse_args()

target, _ = load_target(arguments.tiny)
target.requires_grad_(False)
draft = load_draft(target, arguments.tiny).float().train()
draft.config.rotate_soft_prompts = arguments.rotate_soft_prompts
runner = TargetRunner(target, draft.config, draft.future_channel)

print("| N | K | MiB, N + K rows | MiB, 2N rows | ratio | s, N + K rows | s, 2N rows | ratio |")
print("|---|---|---|---|---|---|---|---|")
torch.manual_seed(0)
for length in arguments.lengths:
    input_ids = torch.randint(target.vocab_size, (1, length), device=target.device)
    labels = input_ids.clone()
    labels[:, 0] = -100
    texts = Texts.of({"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels})
    max_lag = arguments.ttt_steps + 1
    sampled, every = (sample_anchors(labels, replication, max_lag) for replication in (arguments.replication, 0))
    memory, seconds = measure(runner, draft, texts, sampled, arguments)
    memory_of_all, seconds_of_all = measure(runner, draft, texts, every, arguments)
    print(
        f"| {length} | {sampled.positions.shape[1]} | {memory:.1f} | {memory_of_all:.1f} "
        f"| {memory_of_all / memory:.2f} | {seconds:.2f} | {seconds_of_all:.2f} | {seconds_of_all / seconds:.2f} |",
        flush=True,
    )
