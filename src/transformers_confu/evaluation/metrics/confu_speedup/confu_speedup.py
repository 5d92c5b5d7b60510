"""Speed-up of one way of decoding over another, from tokens and seconds. A module for `evaluate`."""

from collections.abc import Sequence

import datasets
import evaluate


_DESCRIPTION = """
Speed-up of a way of decoding over a baseline on the same questions, in two forms that need not agree: total tokens
over total time, which weighs a question by its length, and the mean of the questions' own ratios. (Spec-Bench prints
a third, a mean of rates over another.) Count generated tokens up to and including EOS on both sides, and time whole
calls, prefill included.
"""

_KWARGS_DESCRIPTION = """
Args:
    tokens (list of int), seconds (list of float): Of each question.
    baseline_tokens (list of int), baseline_seconds (list of float): The same of the baseline.
Returns:
    speedup_total (float): Total tokens over total time, divided by that of the baseline.
    speedup_mean (float): Mean over questions of the ratio of the two rates.
    tokens_per_second, baseline_tokens_per_second (float): Total tokens over total time.
Examples:
    >>> metric = evaluate.load("transformers-confu/confu_speedup")
    >>> metric.compute(tokens=[10, 30], seconds=[1.0, 2.0], baseline_tokens=[10, 30], baseline_seconds=[2.0, 3.0])
    {'speedup_total': 1.67, 'speedup_mean': 1.75, 'tokens_per_second': 13.33, 'baseline_tokens_per_second': 8.0}
"""


class ConfuSpeedup(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "tokens": datasets.Value("int64"),
                    "seconds": datasets.Value("float64"),
                    "baseline_tokens": datasets.Value("int64"),
                    "baseline_seconds": datasets.Value("float64"),
                }
            ),
        )

    def _compute(
        self,
        tokens: Sequence[int],
        seconds: Sequence[float],
        baseline_tokens: Sequence[int],
        baseline_seconds: Sequence[float],
    ) -> dict[str, float]:
        return speedup(tokens, seconds, baseline_tokens, baseline_seconds)


def speedup(
    tokens: Sequence[int],
    seconds: Sequence[float],
    baseline_tokens: Sequence[int],
    baseline_seconds: Sequence[float],
) -> dict[str, float]:
    """The metric on plain lists; see the description above."""
    for name, values in (
        ("tokens", tokens),
        ("seconds", seconds),
        ("baseline_tokens", baseline_tokens),
        ("baseline_seconds", baseline_seconds),
    ):
        if any(value <= 0 for value in values):
            raise ValueError(f"`{name}` holds {min(values)}; every question needs tokens and a time above 0.")
    rate = sum(tokens) / sum(seconds)
    baseline = sum(baseline_tokens) / sum(baseline_seconds)
    ratios = [
        (t / s) / (bt / bs)
        for t, s, bt, bs in zip(tokens, seconds, baseline_tokens, baseline_seconds, strict=True)
    ]  # fmt: skip
    return {
        "speedup_total": rate / baseline,
        "speedup_mean": sum(ratios) / len(ratios),
        "tokens_per_second": rate,
        "baseline_tokens_per_second": baseline,
    }
