"""The modules for `evaluate`: loaded by path as users do, and computed by hand."""

import math
import re

import evaluate
import pytest

from transformers_confu.evaluation.metrics import metric_path


@pytest.fixture(scope="module")
def acceptance():
    return evaluate.load(metric_path("confu_acceptance"))


@pytest.fixture(scope="module")
def speedup():
    return evaluate.load(metric_path("confu_speedup"))


def test_acceptance(acceptance):
    result = acceptance.compute(emitted=[[3, 1], [2, 2]], accepted=[[2, 0], [1, 2]])
    assert result == {
        "tau": 2.0,
        "tokens": 8,
        "rounds": 4,
        "accepted_by_depth": [3, 2],
        "survival": [0.75, 0.5],
        "conditional": [0.75, 2 / 3],
    }
    empty = acceptance.compute(emitted=[[]], accepted=[[]])
    assert math.isnan(empty["tau"]) and empty["survival"] == []


@pytest.mark.parametrize("emitted, accepted", [([[2]], [[1, 1]]), ([[3]], [[1]]), ([[1]], [[2]]), ([[0]], [[-1]])])
def test_counts_that_cannot_be(acceptance, emitted, accepted):
    with pytest.raises(ValueError, match="Text 0 emitted .* and accepted .*; expected one count for each round"):
        acceptance.compute(emitted=emitted, accepted=accepted)


def test_speedup(speedup):
    result = speedup.compute(tokens=[10, 30], seconds=[1, 2], baseline_tokens=[10, 30], baseline_seconds=[2, 3])
    assert result["speedup_total"] == pytest.approx((40 / 3) / (40 / 5))
    assert result["speedup_mean"] == pytest.approx((2 + 1.5) / 2)
    assert result["tokens_per_second"] == pytest.approx(40 / 3)
    assert result["baseline_tokens_per_second"] == 8
    with pytest.raises(ValueError, match="`seconds` holds 0.0; every question needs tokens and a time above 0"):
        speedup.compute(tokens=[1], seconds=[0], baseline_tokens=[1], baseline_seconds=[1])


@pytest.mark.parametrize("name", ["confu_acceptance", "confu_speedup"])
def test_a_metric_describes_itself_and_its_example_holds(name):
    metric = evaluate.load(metric_path(name))
    assert metric.name == name and metric.description
    call, said = re.search(r"metric.compute\((.*?)\)(?:\[.*\])?\n\s+(.*)", metric.inputs_description).groups()
    result = metric.compute(**eval(f"dict({call})"))  # noqa: S307 - our own text
    said = eval(said)  # noqa: S307
    assert {k: pytest.approx(v, abs=0.005) for k, v in said.items()} == result if isinstance(said, dict) else said == 2


def test_an_unknown_metric():
    with pytest.raises(ValueError, match="There is no metric 'tau'; there are 'confu_acceptance' and 'confu_speedup'"):
        metric_path("tau")
