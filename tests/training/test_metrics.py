"""Metrics from counts, by hand."""

import pytest
import torch
from transformers.utils import logging

from transformers_confu import ConFuConfig
from transformers_confu.training.objective import Objective
from transformers_confu.training.running_metrics import Counts, warn_of_collapse


@pytest.fixture
def config() -> ConFuConfig:
    return ConFuConfig(num_contemplate_experts=4, num_contemplate_experts_per_token=2, num_future_experts=2)


def make_objective(**fields) -> Objective:
    settings = {
        "loss_sum": torch.tensor(6.0),
        "counted": torch.tensor([4, 2]),
        "correct": torch.tensor([2, 1]),
        "correct_so_far": torch.tensor([2, 1]),
        "rows": 4,
        "rows_with_future": 3,
    }
    return Objective(**(settings | fields))


def test_counts_add_up(config):
    counts = Counts(config, num_steps=2)
    assert counts.metrics() == {} and counts.loss == 0
    counts.add(make_objective(contemplate_load=torch.tensor([1, 0, 4, 3])))
    counts.add(make_objective(loss_sum=torch.tensor(4.0), correct_so_far=torch.tensor([1, 0]), rows_with_future=1))
    assert counts.loss == 10 / 8
    assert counts.metrics() == {
        "accuracy_0": 4 / 8,
        "accuracy_1": 2 / 4,
        "acceptance_0": round(3 / 8, 4),
        "acceptance_1": 1 / 4,
        "tau_greedy": 1 + 3 / 8 + 1 / 4,
        "future_coverage": 4 / 8,
        "contemplate_load_min": 0,
        "contemplate_load_max": 4 / 8,
    }


def test_foresight_is_told_by_position(config):
    counts = Counts(config, num_steps=1)
    one = {"counted": torch.tensor([9]), "correct": torch.tensor([4]), "correct_so_far": torch.tensor([4])}
    counts.add(
        make_objective(
            counted_by_position=torch.tensor([5, 0, 4, 0]), correct_by_position=torch.tensor([3, 0, 1, 0]), **one
        )
    )
    counts.add(
        make_objective(
            counted_by_position=torch.tensor([3, 0, 0, 6]), correct_by_position=torch.tensor([3, 0, 0, 0]), **one
        )
    )
    metrics = counts.metrics()
    assert (metrics["accuracy_to_256"], metrics["accuracy_to_4096"], metrics["accuracy_beyond"]) == (6 / 8, 1 / 4, 0)
    assert "accuracy_to_1024" not in metrics  # nothing was counted there


@pytest.mark.parametrize(
    "load, collapsed",
    [
        ([100, 100, 100, 100], False),
        ([150, 100, 100, 50], False),
        ([200, 190, 10, 0], False),
        ([200, 200, 0, 0], True),
        ([0, 100, 3, 300], True),
        ([10, 10, 0, 0], False),
    ],
    ids=["even", "uneven", "nearly", "collapsed", "all but collapsed", "too few to tell"],
)
def test_collapse_is_when_all_rows_go_to_the_same_experts(config, load, collapsed):
    counts = Counts(config, num_steps=2)
    counts.add(make_objective(contemplate_load=torch.tensor(load), future_load=torch.tensor([400, 0])))
    # The router of [f] must choose two of its two experts.
    assert counts.collapsed_routers() == (["contemplate"] if collapsed else [])


def test_the_warning_says_what_to_do(config, caplog):
    logging.enable_propagation()
    warn_of_collapse("contemplate", config)
    assert "The router of [con] has collapsed: it sends nearly every row to the same 2 of 4 experts." in caplog.text
    assert "Lower `contemplate_learning_rate`" in caplog.text
