"""Plain `generate` and ConFu side by side on a small real model: `confu evaluate` on a few prompts, told in words."""

import argparse
import statistics
import sys
import textwrap
from typing import Any

import torch
from transformers.utils import logging

from ..common.loading import default_device, default_draft, default_dtype
from ..common.texts import TIE
from ..evaluation.answering import Models
from ..evaluation.arguments import EvaluationArguments
from ..evaluation.arms import Arm, Setting
from ..evaluation.questions import Question
from ..publishing.check_answers import CHECK_PROMPTS


PLAIN, CONFU = Arm("plain"), Arm("draft", "draft", lookup=True)  # no knobs: what the draft does by itself


def main(argv: list[str] | None = None) -> int:
    """The command; its exit status is 1 if a text differs in float32 for no reason that rounding explains."""
    parser = argparse.ArgumentParser(
        prog="confu demo",
        description="Answer prompts with plain generate and with ConFu, and compare texts and speed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--draft", default=default_draft(), help="folder or Hub id of the draft")
    parser.add_argument("--device", default=default_device(), help="where to run")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="of target and draft; bfloat16 where `device` computes in it"
    )
    parser.add_argument("--max-new-tokens", "--max_new_tokens", type=int, default=128, help="longest answer")
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each prompt")
    parser.add_argument("--prompt", action="append", help="in place of the built-in ones; may be given several times")
    options = parser.parse_args(argv)
    dtype = options.dtype or default_dtype(options.device)
    arguments = EvaluationArguments(
        output="", drafts=[f"draft={options.draft}"], device=options.device, dtypes=[dtype], runs=options.runs,
        max_new_tokens=[options.max_new_tokens],
    )  # fmt: skip
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # an answer may hold what the terminal's encoding cannot show
    logging.disable_progress_bar()
    models = Models.load(arguments, dtype)
    print(f"Target SmolLM2-135M-Instruct, draft {options.draft}")
    print(f"{dtype}, {options.device}, {torch.get_num_threads()} threads, up to {options.max_new_tokens} tokens")

    setting = Setting(dtype, 0.0, options.max_new_tokens)
    calls = models.calls(setting, [PLAIN, CONFU])
    models.warm_up(calls)
    units = []
    for number, prompt in enumerate(options.prompt or CHECK_PROMPTS):
        question = Question(str(number), "demo", (prompt,))
        runs = [models.answer(question, run, setting, calls) for run in range(options.runs)]
        show(prompt, runs, models.tokenizer)
        units += runs
    return summarise(units, dtype)


def show(prompt: str, runs: list[dict[str, Any]], tokenizer: Any) -> None:
    """One prompt: the text, ConFu's from where it parts, and the speed of both arms."""
    plain, confu = _turns(runs, 0), _turns(runs, 1)
    departure = runs[0]["answers"][1]["departure"]
    text = tokenizer.decode(plain[0]["token_ids"], skip_special_tokens=True)
    print(f"\n{'-' * 60}\n{textwrap.fill(prompt, 80)}\n\n{textwrap.indent(text.strip(), '  ')}\n")
    if departure:
        position = departure["position"]
        rest = tokenizer.decode(confu[0]["token_ids"][position:], skip_special_tokens=True)
        print(f"  ConFu parts from it at token {position + 1} and goes on:")
        print(textwrap.indent(f"==> {rest.strip()}", "  "), end="\n\n")
    sameness = "another text" if departure else "the same text"
    print(f"  plain {_rate(plain):6.1f} tokens/s", flush=True)
    print(f"  ConFu {_rate(confu):6.1f} tokens/s, {_rate(confu) / _rate(plain):.2f}x, {sameness}", flush=True)


def summarise(units: list[dict[str, Any]], dtype: str) -> int:
    """Speed-up with its spread over the runs, tau, and how many texts are the same. The exit status."""
    # The arms of one run stand side by side in time, so a machine that slows down in between slows both.
    speedups = []
    for run in sorted({unit["run"] for unit in units}):
        of_run = [unit for unit in units if unit["run"] == run]
        speedups.append(_rate(_turns(of_run, 1)) / _rate(_turns(of_run, 0)))
    emitted = [count for turn in _turns(units, 1) for count in turn["rounds"]["emitted"]]
    first = [unit["answers"][1]["departure"] for unit in units if unit["run"] == 0]
    print(f"\n{'=' * 60}")
    print(f"plain generate {_rate(_turns(units, 0)):.1f} tokens/s")
    print(f"ConFu          {_rate(_turns(units, 1)):.1f} tokens/s")
    print(
        f"speed-up       {statistics.median(speedups):.2f}x, the median of {len(speedups)} interleaved runs "
        f"({min(speedups):.2f} to {max(speedups):.2f})"
    )
    if emitted:
        print(f"tau            {statistics.mean(emitted):.2f} tokens per forward of the target")
    print(f"identical      {first.count(None)} of {len(first)} texts")
    if dtype == "bfloat16":
        print(
            "\nbf16 kernels round differently with the number of rows they compute, so a text parts from plain\n"
            "generate's where two tokens score nearly alike. `--dtype float32` is exact."
        )
    elif faults := [where for where in first if where and (where["gap"] is None or where["gap"] > TIE)]:
        print(f"Not explained by rounding, please report it: {faults}.", file=sys.stderr)
        return 1
    return 0


def _turns(units: list[dict[str, Any]], arm: int) -> list[dict[str, Any]]:
    return [unit["answers"][arm]["turns"][0] for unit in units]


def _rate(turns: list[dict[str, Any]]) -> float:
    """Tokens per second, prefill included."""
    return sum(len(turn["token_ids"]) for turn in turns) / sum(turn["seconds"] for turn in turns)
