"""Speed-up of one way of decoding over another, from tokens and seconds. A module for `evaluate`."""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np


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


COLUMNS = {"tokens": "int64", "seconds": "float64", "baseline_tokens": "int64", "baseline_seconds": "float64"}


class ConfuSpeedup(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({name: datasets.Value(kind) for name, kind in COLUMNS.items()}),
        )

    def _compute(self, **columns: Sequence[float]) -> dict[str, float]:
        for name, values in columns.items():
            if min(values) <= 0:
                raise ValueError(f"`{name}` holds {min(values)}; every question needs tokens and a time above 0.")
        given = {name: np.array(values) for name, values in columns.items()}
        tokens, seconds, other_tokens, other_seconds = (given[name] for name in COLUMNS)
        rate, baseline = tokens.sum() / seconds.sum(), other_tokens.sum() / other_seconds.sum()
        ratios = (tokens / seconds) / (other_tokens / other_seconds)
        return {
            "speedup_total": float(rate / baseline),
            "speedup_mean": float(ratios.mean()),
            "tokens_per_second": float(rate),
            "baseline_tokens_per_second": float(baseline),
        }
