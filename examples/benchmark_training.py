"""
How fast the steps of each kind of training are, on this machine, with a target and data of your own:

    python examples/benchmark_training.py --target demo --data answers.jsonl.gz --output_dir runs/benchmark \
        --bf16 --tokens_per_batch 1500 --ttt_steps 4

All options of `confu train` are known. In each round every arm makes one pass over the same batches, from the same
start, with optimiser and all; the arms take turns in one process, and every other round in the opposite order. A pass
before the first round is not among the figures: in it the target reads what is kept afterwards. Nor is the first step
of any pass, which allocates.

The arms, and what is computed in each of their steps:

- **plain**: the EAGLE-3 core by the defaults of `ConFuTrainingArguments`: the target reads the batch, and the draft is
  in float32 without autocast.
- **core, live**: the same with `--bf16`; without that option there is no such arm.
- **core, kept**: the taps and final states of the target come from files (`feature_cache`).
- **joint, kept**: core and `[f]` are taught, soft prompts and `[con]` are not; what the target says and the future
  predictions come from files.
- **joint**: everything is taught: the target reads the batch, then the contemplate rows; gradients pass through it.
- **warm-up**: soft prompts and `[con]` alone; the draft has no part in it. Rows are contemplate rows here, draft rows
  elsewhere.

Where the losses of two arms are equal, so are their curves by step, and the ratio of speeds is that of the times to
any loss. For loss and tau by the hour of a real run see `training_curves.py`.
"""

import copy
import dataclasses
import json
import tempfile
import time
from dataclasses import dataclass, field
from itertools import chain, islice
from statistics import median

import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from transformers import HfArgumentParser, PreTrainedModel, PrinterCallback, TrainerCallback, set_seed

from transformers_confu import ConFuDraftModel
from transformers_confu.data import load_rows, prepare_dataset
from transformers_confu.evaluation.machine import describe_machine, synchronise
from transformers_confu.training import ConFuTrainer, ConFuTrainingArguments
from transformers_confu.training.train import DraftArguments, load_target_once, new_draft


# Options that each arm changes; a true `feature_cache` stands for the folder of the benchmark.
ARMS = {
    "plain": {"stage": "core", "bf16": False, "fp16": False},
    "core, live": {"stage": "core"},
    "core, kept": {"stage": "core", "feature_cache": True},
    "joint, kept": {"stage": "joint", "frozen": ["contemplate"], "feature_cache": True},
    "joint": {"stage": "joint"},
    "warm-up": {"stage": "warm_up"},
}


@dataclass
class BenchmarkArguments:
    rows: int = field(default=200, metadata={"help": "Rows of the data, from its beginning, that a pass goes over."})
    rounds: int = field(default=3, metadata={"help": "Passes of each arm."})


class Clock(TrainerCallback):
    """The time at the end of every step, in seconds."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        synchronise(args.device)
        self.times.append(time.perf_counter())


@dataclass
class Pass:
    """One pass of an arm, its first step apart."""

    steps: int
    seconds: float
    tokens: int
    rows: int
    loss: float  # of all steps, per row


def one_pass(draft: ConFuDraftModel, target: PreTrainedModel, dataset: Dataset, args: ConFuTrainingArguments) -> Pass:
    AcceleratorState._reset_state()  # which would keep the precision of the first trainer of the process
    clock = Clock()
    trainer = ConFuTrainer(
        model=copy.deepcopy(draft), target_model=target, args=args, train_dataset=dataset, callbacks=[clock]
    )
    trainer.remove_callback(PrinterCallback)
    # What the steps are about to learn from.
    batches = iter(trainer.get_train_dataloader())
    tokens, rows = [], []
    while True:
        of_step, counted = trainer.get_batch_samples(batches, args.gradient_accumulation_steps, args.device)
        if not of_step:
            break
        tokens.append(sum(int(batch["attention_mask"].sum()) for batch in of_step))
        rows.append(int(counted))
    if len(tokens) < 2:
        raise ValueError("All rows make one step, and the first is not counted: raise `rows`, or lower the batches.")
    loss = trainer.train().training_loss
    return Pass(len(tokens) - 1, clock.times[-1] - clock.times[0], sum(tokens[1:]), sum(rows[1:]), loss)


def arms_of(args: ConFuTrainingArguments, folder: str) -> dict[str, ConFuTrainingArguments]:
    common = {
        "output_dir": folder,
        "num_train_epochs": 1,
        "max_steps": -1,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    arms = {}
    for name, changes in ARMS.items():
        if "feature_cache" in changes:
            changes = changes | {"feature_cache": f"{folder}/features"}
        if name != "core, live" or args.bf16 or args.fp16:
            arms[name] = dataclasses.replace(args, **common | changes)
    return arms


def table(passes: dict[str, list[Pass]]) -> str:
    """Medians over the rounds; ratios within a round, as median, least and greatest."""
    lines = [
        "| arm | s a step | tokens/s | rows/s | times plain (least to greatest) | first pass, tokens/s | loss a row |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (first, *rounds) in passes.items():
        step = median(one.seconds / one.steps for one in rounds)
        tokens, rows = (median(getattr(one, what) / one.seconds for one in rounds) for what in ("tokens", "rows"))
        ratios = [plain.seconds / one.seconds for plain, one in zip(passes["plain"][1:], rounds, strict=True)]
        lines.append(
            f"| {name} | {step:.2f} | {tokens:.0f} | {rows:.0f} "
            f"| {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) "
            f"| {first.tokens / first.seconds:.0f} | {median(one.loss for one in rounds):.4f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = HfArgumentParser((BenchmarkArguments, DraftArguments, ConFuTrainingArguments), description=__doc__)
    benchmark, arguments, args = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    target, tokenizer = load_target_once(
        arguments.target, args.target_dtype, args.device, json.dumps(args.target_device_map)
    )
    rows = islice(chain.from_iterable(map(load_rows, arguments.data)), benchmark.rows)
    vocab_size = target.config.get_text_config(decoder=True).vocab_size
    dataset = prepare_dataset(rows, tokenizer, arguments.max_length, vocab_size=vocab_size)
    if arguments.draft is None:
        draft = new_draft(target, tokenizer, dataset, arguments)
    else:
        draft = ConFuDraftModel.from_pretrained(arguments.draft, dtype=torch.float32)

    with tempfile.TemporaryDirectory() as folder:
        arms = arms_of(args, folder)
        passes: dict[str, list[Pass]] = {name: [] for name in arms}
        for number in range(1 + benchmark.rounds):
            for name in reversed(arms) if number % 2 else arms:
                passes[name].append(one_pass(draft, target, dataset, arms[name]))
                newest = passes[name][-1]
                place = f"round {number} of {benchmark.rounds}" if number else "first pass"
                print(f"{place}, {name}: {newest.steps} steps, {newest.seconds:.1f} s", flush=True)
    one = passes["plain"][0]
    print(f"\n{len(dataset)} rows; timed of each pass: {one.steps} steps, {one.tokens} tokens, {one.rows} draft rows")
    print(", ".join(f"{name}: {value}" for name, value in describe_machine(args.device).items()), end="\n\n")
    print(table(passes))


if __name__ == "__main__":
    main()
