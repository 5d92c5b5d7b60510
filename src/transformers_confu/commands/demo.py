"""Plain `generate` and ConFu side by side on a small real model: `confu demo --help`."""

import argparse
import shutil
import statistics
import sys
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..common.demo_target import load_demo_target
from ..common.loading import default_device, default_draft, default_dtype, load_draft
from ..inference.modeling_confu import ConFuDraftModel


PROMPTS = [
    "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "Write a Python function that returns the n-th Fibonacci number, and explain how it works.",
    "A train travels 60 miles in 1.5 hours. What is its average speed, and how far does it travel in 4 hours? "
    "Explain step by step.",
    "Summarize in two sentences: The honey bee is a social insect. A colony consists of one queen, some hundred "
    "drones and tens of thousands of workers. The workers gather nectar and pollen, build the comb, feed the brood "
    "and guard the hive. By carrying pollen from flower to flower, bees make many plants bear fruit, among them a "
    "large part of the crops that people eat.",
    "Translate into French: Good morning! The train to Paris leaves at nine, and I still have to buy a ticket.",
]


@dataclass
class Arm:
    """What one way of decoding did with one prompt: the new tokens, and the seconds of each run."""

    token_ids: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens of all runs, which write the same text."""
        return len(self.token_ids) * len(self.seconds)

    @property
    def speed(self) -> float:
        """Tokens per second, prefill included."""
        return self.tokens / sum(self.seconds)


@dataclass
class Comparison:
    """One prompt in both arms, and the emitted tokens of each ConFu round."""

    prompt: str
    plain: Arm = field(default_factory=Arm)
    confu: Arm = field(default_factory=Arm)
    emitted: list[int] = field(default_factory=list)

    @property
    def identical(self) -> bool:
        return self.plain.token_ids == self.confu.token_ids


def run(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    draft: ConFuDraftModel | None = None,
) -> tuple[list[int], float]:
    """New token ids of a greedy answer and the seconds it took; plain without a draft."""
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(target.device)
    started = time.perf_counter()
    sequences = target.generate(
        **inputs, assistant_model=draft, max_new_tokens=max_new_tokens, do_sample=False, return_dict_in_generate=False
    )
    # `tolist` waits for the device, so the clock stops after the last token is really there.
    token_ids = sequences[0, inputs["input_ids"].shape[1] :].tolist()
    return token_ids, time.perf_counter() - started


def compare(
    target: PreTrainedModel,
    draft: ConFuDraftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    runs: int,
) -> Comparison:
    """Both arms in turn, `runs` times each; the one that goes first changes from run to run."""
    comparison = Comparison(prompt)
    for number in range(runs):
        arms = [(comparison.plain, None), (comparison.confu, draft)]
        for arm, assistant in reversed(arms) if number % 2 else arms:
            arm.token_ids, seconds = run(target, tokenizer, prompt, max_new_tokens, assistant)
            arm.seconds.append(seconds)
    comparison.emitted = draft.last_statistics.emitted
    return comparison


def first_difference(one: list[int], other: list[int]) -> int:
    """Length of the common start."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def wrapped(text: str, width: int) -> str:
    """Text folded to the width of the terminal and indented; its own line breaks stay."""
    return "\n".join(
        textwrap.fill(line, width, initial_indent="  ", subsequent_indent="  ", replace_whitespace=False)
        for line in text.strip().splitlines()
    )


def answer(tokenizer: PreTrainedTokenizerBase, token_ids: list[int], common: int, width: int) -> str:
    """A wrapped answer; where it stops being the other arm's, at token `common`, stands an arrow."""
    text = tokenizer.decode(token_ids, skip_special_tokens=True)
    if common < len(token_ids):
        start = len(tokenizer.decode(token_ids[:common], skip_special_tokens=True))
        text = f"{text[:start]} ==> {text[start:]}"
    return wrapped(text, width)


def bars(comparison: Comparison, width: int) -> str:
    """Tokens per second of both arms as two bars, and what the draft did, beside ConFu's."""
    plain, confu = comparison.plain.speed, comparison.confu.speed
    rounds = len(comparison.emitted)
    # An answer of one token comes from prefill and has no round.
    tau = f", tau {sum(comparison.emitted) / rounds:.2f}" if rounds else ""
    lines = []
    for name, speed, note in (("plain", plain, ""), ("ConFu", confu, f"  {confu / plain:.2f}x{tau}")):
        figures = f"{speed:6.1f} tokens/s{note}"
        length = max(1, round((width - 44) * speed / max(plain, confu)))
        lines.append(f"  {name} {'#' * length} {figures}")
    return "\n".join(lines)


def show(comparison: Comparison, tokenizer: PreTrainedTokenizerBase, width: int) -> None:
    print(f"\n{'-' * width}\n{textwrap.fill(comparison.prompt, width)}\n")
    plain, confu = comparison.plain.token_ids, comparison.confu.token_ids
    common = first_difference(plain, confu)
    if comparison.identical:
        print(answer(tokenizer, plain, common, width))
        print(f"\n  {len(plain)} tokens, identical in both")
    else:
        print(f"  plain:\n{answer(tokenizer, plain, common, width)}")
        print(f"\n  ConFu:\n{answer(tokenizer, confu, common, width)}")
        print(f"\n  {len(plain)} and {len(confu)} tokens, different from token {common + 1} on (==>)")
    print(bars(comparison, width), flush=True)


def summarise(comparisons: list[Comparison], dtype: torch.dtype, width: int) -> None:
    print(f"\n{'=' * width}")
    for name in ("plain", "confu"):
        arms = [getattr(comparison, name) for comparison in comparisons]
        tokens, seconds = sum(arm.tokens for arm in arms), sum(sum(arm.seconds) for arm in arms)
        label = {"plain": "plain generate", "confu": "ConFu"}[name]
        print(f"{label:<15}{tokens:>6} tokens in {seconds:6.1f} s = {tokens / seconds:6.1f} tokens/s")
    # The arms of one run stand side by side in time, so a machine that slows down in between slows both.
    speed_ups = []
    for number in range(len(comparisons[0].plain.seconds)):
        plain = sum(len(c.plain.token_ids) for c in comparisons) / sum(c.plain.seconds[number] for c in comparisons)
        confu = sum(len(c.confu.token_ids) for c in comparisons) / sum(c.confu.seconds[number] for c in comparisons)
        speed_ups.append(confu / plain)
    print(
        f"{'speed-up':<15}{statistics.median(speed_ups):.2f}x, the median of {len(speed_ups)} interleaved runs "
        f"({min(speed_ups):.2f} to {max(speed_ups):.2f})"
    )
    emitted = [tokens for comparison in comparisons for tokens in comparison.emitted]
    if emitted:
        print(f"{'tau':<15}{sum(emitted) / len(emitted):.2f} tokens per forward of the target, {len(emitted)} rounds")
    identical = sum(comparison.identical for comparison in comparisons)
    print(f"{'identical':<15}{identical} of {len(comparisons)} texts")
    if dtype == torch.bfloat16:
        note = (
            "bf16 kernels round differently with the number of rows they compute, so a text parts from plain "
            "generate's where two tokens score nearly alike. `--dtype float32` is exact."
        )
        print(f"\n{textwrap.fill(note, width)}")


def main(argv: list[str] | None = None) -> int:
    """The command; its exit status is 1 if a text differs in float32."""
    parser = argparse.ArgumentParser(
        prog="confu demo",
        description="Answer prompts with plain generate and with ConFu, and compare texts and speed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--draft", default=default_draft(), help="folder or Hub id of the draft")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default=default_dtype(),
        help="of target and draft; bfloat16 where the hardware computes in it",
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest answer")
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each prompt and arm")
    parser.add_argument(
        "--prompt", action="append", help="a prompt in place of the built-in ones; may be given several times"
    )
    arguments = parser.parse_args(argv)
    for name in ("max_new_tokens", "runs"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; it must be at least 1.")

    width = min(100, max(60, shutil.get_terminal_size().columns))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # an answer may hold what the terminal's encoding cannot show
    logging.disable_progress_bar()
    dtype = getattr(torch, arguments.dtype)
    device = default_device()
    draft = load_draft(arguments.draft, dtype).to(device)
    target, tokenizer = load_demo_target(dtype=dtype, device=device)

    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    draft_name = Path(arguments.draft).name if Path(arguments.draft).is_dir() else arguments.draft
    print(textwrap.fill(f"Target SmolLM2-135M-Instruct, draft {draft_name}; {arguments.dtype}, {where}", width))

    prompts = arguments.prompt or PROMPTS
    for assistant in (None, draft):
        run(target, tokenizer, prompts[0], min(16, arguments.max_new_tokens), assistant)  # warm-up
    comparisons = []
    for prompt in prompts:
        comparisons.append(compare(target, draft, tokenizer, prompt, arguments.max_new_tokens, arguments.runs))
        show(comparisons[-1], tokenizer, width)
    summarise(comparisons, dtype, width)
    if dtype == torch.float32 and not all(comparison.identical for comparison in comparisons):
        print(
            "A text differs in float32. That is a fault, unless plain generate has two scores within 1e-4 of each "
            "other there; `make exactness` tells one from the other.",
            file=sys.stderr,
        )
        return 1
    return 0
