"""Speed and accepted length of a draft against plain `generate`, prompt lookup and EAGLE-3 mode, in one process.

The arms take turns on every question, in a new random order each time, so that a machine whose speed drifts favours
none. Counted are generated tokens up to EOS or the limit, the same for all arms; prefill counts as time.
"""

import contextlib
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers import HfArgumentParser, PreTrainedModel
from transformers.utils import logging

from ..demo_target import load_target
from ..generation_confu import confu_generation_config
from ..modeling_confu import ConFuDraftModel
from ..training.data import encode_prompt, load_jsonl


@dataclass
class BenchmarkArguments:
    """What to measure."""

    draft: str = field(metadata={"help": "Draft: a folder or Hub id."})
    questions: str = field(metadata={"help": "JSONL of `question_id`, `category`, `turns`; the first turn is asked."})
    target: str = field(default="demo", metadata={"help": "Target: a folder, a Hub id, or 'demo'."})
    dtype: str = field(default="bfloat16", metadata={"help": "Dtype of target and draft."})
    num_questions: int = field(default=20, metadata={"help": "Questions, spread evenly over the groups of the file."})
    max_new_tokens: int = field(default=128, metadata={"help": "Limit of each answer."})
    temperature: float = field(default=0.0, metadata={"help": "0 is greedy; else sampling, seeded per question."})
    tree_size: int | None = field(default=None, metadata={"help": "Nodes, root included; the draft's own default."})
    depth: int | None = field(default=None, metadata={"help": "Depth of the tree; the draft's own default."})
    branching: int | None = field(default=None, metadata={"help": "Branching; the draft's own default."})
    contemplation: int | None = field(default=None, metadata={"help": "Contemplate rows; the draft's own default."})
    runs: int = field(default=3, metadata={"help": "Timed passes over the questions."})
    seed: int = field(default=0, metadata={"help": "Seed of the order of arms, and of sampling."})
    output: str | None = field(default=None, metadata={"help": "Write one JSON line per question, arm and run here."})


@dataclass
class Measurement:
    """One answer: which arm, what came out, how long it took. `tau` counts rounds only, see `ConFuStatistics`."""

    run: int
    question_id: int | str
    group: str
    arm: str
    tokens: int
    seconds: float
    rounds: int
    tokens_in_rounds: int
    accepted_by_depth: list[int]
    identical: bool


ARMS = ["plain", "prompt lookup", "EAGLE-3 mode", "ConFu"]
SINGLE_CATEGORY_GROUPS = ("translation", "summarization", "qa", "math_reasoning", "rag")


def group_of(category: str) -> str:
    """Spec-Bench's six groups: MT-bench's eight categories are one."""
    return category if category in SINGLE_CATEGORY_GROUPS else "mt_bench"


def stratified(questions: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """The first questions of each group in turn, until there are `number`; in the file's order."""
    by_group: dict[str, list[dict[str, Any]]] = {}
    for question in questions:
        by_group.setdefault(group_of(question["category"]), []).append(question)
    chosen: list[dict[str, Any]] = []
    for rank in range(len(questions)):
        chosen.extend(group[rank] for group in by_group.values() if rank < len(group))
        if len(chosen) >= number:
            break
    ids = {id(question) for question in chosen[:number]}
    return [question for question in questions if id(question) in ids]


def arms_of(
    target: PreTrainedModel, draft: ConFuDraftModel, arguments: BenchmarkArguments
) -> dict[str, dict[str, Any]]:
    """Arm -> keyword arguments of `generate`."""
    options: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens, "do_sample": arguments.temperature > 0}
    if arguments.temperature > 0:
        options |= {"temperature": arguments.temperature, "top_k": 0, "top_p": 1.0}
    knobs = {
        f"confu_{name}": getattr(arguments, name)
        for name in ("tree_size", "depth", "branching", "contemplation")
        if getattr(arguments, name) is not None
    }
    plain = confu_generation_config(target, **options)
    return {
        "plain": {"generation_config": plain},
        "prompt lookup": {
            "generation_config": confu_generation_config(target, prompt_lookup_num_tokens=10, **options)
        },
        "EAGLE-3 mode": {
            "generation_config": confu_generation_config(target, **options | knobs | {"confu_contemplation": 0}),
            "assistant_model": draft,
        },
        "ConFu": {
            "generation_config": confu_generation_config(target, **options | knobs),
            "assistant_model": draft,
        },
    }


def measure(
    target: PreTrainedModel,
    draft: ConFuDraftModel,
    prompts: list[tuple[dict[str, Any], torch.LongTensor]],
    arguments: BenchmarkArguments,
    report: Callable[[Measurement], None],
) -> list[Measurement]:
    """All runs of all arms over `prompts` (question, ids `(1, length)`), each reported as soon as it is made."""
    arms = arms_of(target, draft, arguments)
    order = random.Random(arguments.seed)
    measurements = []
    for kwargs in arms.values():  # what is allocated or compiled on first use is not timed
        target.generate(prompts[0][1].to(target.device), **kwargs)
    for run in range(arguments.runs):
        for question, ids in prompts:
            answers: dict[str, tuple[torch.LongTensor, float, Any]] = {}
            for arm in order.sample(ARMS, len(ARMS)):
                torch.manual_seed(arguments.seed)
                draft.last_statistics = None
                _synchronise(target.device)
                started = time.perf_counter()
                output = target.generate(ids.to(target.device), **arms[arm])
                _synchronise(target.device)
                answers[arm] = (output[0, ids.shape[1] :], time.perf_counter() - started, draft.last_statistics)
            for arm, (answer, seconds, rounds) in answers.items():
                measurements.append(
                    Measurement(
                        run=run,
                        question_id=question["question_id"],
                        group=group_of(question["category"]),
                        arm=arm,
                        tokens=len(answer),
                        seconds=seconds,
                        rounds=rounds.rounds if rounds else 0,
                        tokens_in_rounds=sum(rounds.emitted) if rounds else 0,
                        accepted_by_depth=rounds.accepted_by_depth if rounds else [],
                        identical=torch.equal(answer, answers["plain"][0]),
                    )
                )
                report(measurements[-1])
    return measurements


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def table(measurements: list[Measurement]) -> str:
    """Markdown: medians over runs, with the lowest and highest run in brackets."""
    runs = sorted({measurement.run for measurement in measurements})
    lines = [
        "| arm | tokens/s | speed-up, total | speed-up, mean of questions | tau | identical texts |",
        "| --- | --- | --- | --- | --- | --- |",
    ]

    def of(arm: str, run: int) -> list[Measurement]:
        return [m for m in measurements if m.arm == arm and m.run == run]

    def rate(some: list[Measurement]) -> float:
        return sum(m.tokens for m in some) / sum(m.seconds for m in some)

    for arm in ARMS:
        rates = [rate(of(arm, run)) for run in runs]
        totals = [rate(of(arm, run)) / rate(of("plain", run)) for run in runs]
        means = []
        for run in runs:
            plain = {m.question_id: m.tokens / m.seconds for m in of("plain", run)}
            means.append(statistics.mean(m.tokens / m.seconds / plain[m.question_id] for m in of(arm, run)))
        first = of(arm, runs[0])
        rounds = sum(m.rounds for m in first)
        tau = f"{sum(m.tokens_in_rounds for m in first) / rounds:.3f}" if rounds else ""
        identical = f"{sum(m.identical for m in first)}/{len(first)}"
        lines.append(
            f"| {arm} | {_spread(rates, 1)} | {_spread(totals, 3)} | {_spread(means, 3)} | {tau} | {identical} |"
        )
    return "\n".join(lines)


def _spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def main(argv: list[str] | None = None) -> None:
    """Measure and print the table."""
    (arguments,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses(argv)
    logging.set_verbosity_error()
    target, tokenizer = load_target(arguments.target, arguments.dtype)
    draft = ConFuDraftModel.from_pretrained(arguments.draft, dtype=target.dtype).to(target.device).eval()
    questions = stratified(load_jsonl(arguments.questions), arguments.num_questions)
    prompts = [(question, torch.tensor([encode_prompt(question["turns"][0], tokenizer)])) for question in questions]

    total = arguments.runs * len(prompts) * len(ARMS)
    with tqdm(total=total, unit="answer") as progress, contextlib.ExitStack() as stack:
        file = stack.enter_context(open(arguments.output, "w")) if arguments.output else None

        def report(measurement: Measurement) -> None:
            progress.update()
            if file is not None:
                file.write(json.dumps(asdict(measurement)) + "\n")
                file.flush()

        measurements = measure(target, draft, prompts, arguments, report)
    print(
        f"{len(prompts)} questions, {arguments.runs} runs, up to {arguments.max_new_tokens} tokens, "
        f"T = {arguments.temperature}, {arguments.dtype}; torch {torch.__version__}, transformers "
        f"{transformers.__version__}, {platform.machine()}, {torch.get_num_threads()} threads"
    )
    print(table(measurements))


if __name__ == "__main__":
    main()
