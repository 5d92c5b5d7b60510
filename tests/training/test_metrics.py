"""Metrics from counts, by hand."""

import pytest
import torch

from transformers_confu import ConFuConfig
from transformers_confu.training.metrics import Counts
from transformers_confu.training.objective import Objective


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
