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
    >>> metric = evaluate.load(metric_path("confu_speedup"))
    >>> metric.compute(tokens=[10, 30], seconds=[1.0, 2.0], baseline_tokens=[10, 30], baseline_seconds=[2.0, 3.0])
    {'speedup_total': 1.67, 'speedup_mean': 1.75, 'tokens_per_second': 13.33, 'baseline_tokens_per_second': 8.0}
"""


class ConfuSpeedup(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        kinds = {"tokens": "int64", "seconds": "float64", "baseline_tokens": "int64", "baseline_seconds": "float64"}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({name: datasets.Value(kind) for name, kind in kinds.items()}),
        )

    def _compute(self, **columns: Sequence[float]) -> dict[str, float]:
        for name, values in columns.items():
            if any(value <= 0 for value in values):
                raise ValueError(f"`{name}` holds {min(values)}; every question needs tokens and a time above 0.")
        tokens, seconds = columns["tokens"], columns["seconds"]
        baseline_tokens, baseline_seconds = columns["baseline_tokens"], columns["baseline_seconds"]
        rate = sum(tokens) / sum(seconds)
        baseline = sum(baseline_tokens) / sum(baseline_seconds)
        ratios = [
            (own / spent) / (others / taken)
            for own, spent, others, taken in zip(tokens, seconds, baseline_tokens, baseline_seconds, strict=True)
        ]
        return {
            "speedup_total": rate / baseline,
            "speedup_mean": sum(ratios) / len(ratios),
            "tokens_per_second": rate,
            "baseline_tokens_per_second": baseline,
        }
