"""The modules for `evaluate`: loaded by path as users do, and computed by hand."""

import math

import evaluate
import pytest

from transformers_confu.evaluation.metrics import metric_path


def test_acceptance():
    metric = evaluate.load(metric_path("confu_acceptance"))
    assert metric.description and metric.compute(emitted=[[3, 1], [2, 2]], accepted=[[2, 0], [1, 2]]) == {
        "tau": 2.0,
        "tokens": 8,
        "rounds": 4,
        "accepted_by_depth": [3, 2],
        "survival": [0.75, 0.5],
        "conditional": [0.75, 2 / 3],
    }
    empty = metric.compute(emitted=[[]], accepted=[[]])
    assert math.isnan(empty["tau"]) and empty["survival"] == []
    for emitted, accepted in (([2], [1, 1]), ([3], [1]), ([1], [2]), ([0], [-1])):  # counts that cannot be
        with pytest.raises(ValueError, match="Text 0 emitted .* and accepted .*; expected one count for each round"):
            metric.compute(emitted=[emitted], accepted=[accepted])


def test_speedup():
    metric = evaluate.load(metric_path("confu_speedup"))
    result = metric.compute(tokens=[10, 30], seconds=[1, 2], baseline_tokens=[10, 30], baseline_seconds=[2, 3])
    assert metric.description and result == {
        "speedup_total": pytest.approx((40 / 3) / (40 / 5)),
        "speedup_mean": pytest.approx((2 + 1.5) / 2),
        "tokens_per_second": pytest.approx(40 / 3),
        "baseline_tokens_per_second": 8,
    }
    with pytest.raises(ValueError, match="`seconds` holds 0.0; every question needs tokens and a time above 0"):
        metric.compute(tokens=[1], seconds=[0], baseline_tokens=[1], baseline_seconds=[1])
