"""Seconds of a processor for a step of each arm, and the most memory it takes: a few steps of each in one process.

    python experiments/time_arms.py --output runs/times --steps 4 [--arms ARM ...]

The first step, of the largest batch, is left out. Options as of the groups.
"""

import argparse
import functools
import shutil
import time
from pathlib import Path

import changes
import forms
from arms import options
from transformers import TrainerCallback

from transformers_confu.training import ConFuTrainer, train


class Clock(TrainerCallback):
    """Processor time between the begins of steps, and the greatest memory of a step (Linux)."""

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.process_time()
        Path("/proc/self/clear_refs").write_text("5")

    def on_step_end(self, args, state, control, **kwargs):
        spent = time.process_time() - self.start
        status = Path("/proc/self/status").read_text()
        memory = int(status.split("VmHWM:")[1].split()[0]) / 1e6
        print(f"  step {state.global_step}: {spent:.2f} s, {memory:.1f} GB", flush=True)


def main() -> None:
    arms = forms.ARMS | changes.ARMS
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True)
    parser.add_argument("--arms", nargs="+", default=list(arms), choices=list(arms), metavar="ARM")
    parser.add_argument("--target", default="demo")
    parser.add_argument("--data", default="hub_cards/smollm2-135m-instruct-answers")
    for name, value in (("steps", 4), ("ttt_steps", 4), ("tokens_per_batch", 2048), ("max_length", 768)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.set_defaults(learning_rate=1.5e-3, seed=42, save_steps=1000, held_out_share=0.04)
    args, more = parser.parse_known_args()
    train.ConFuTrainer = functools.partial(ConFuTrainer, callbacks=[Clock()])
    for arm in args.arms:
        folder = Path(args.output, arm)
        shutil.rmtree(folder, ignore_errors=True)
        print(arm, flush=True)
        train.main([*options(args, folder), *arms[arm], *more, "--save_strategy", "no"])


if __name__ == "__main__":
    main()
