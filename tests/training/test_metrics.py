"""Metrics from counts, by hand."""

import torch

from transformers_confu import ConFuConfig
from transformers_confu.training.metrics import add_counts, metrics_of, no_counts


def test_counts_add_up():
    config = ConFuConfig(num_contemplate_experts=4, num_contemplate_experts_per_token=2, num_future_experts=2)
    nothing = no_counts(config, num_steps=2)
    assert metrics_of(nothing) == {}
    first = nothing | {
        "rows": torch.tensor(4),
        "rows_with_future": torch.tensor(3),
        "counted": torch.tensor([4, 2]),
        "correct": torch.tensor([2, 1]),
        "correct_so_far": torch.tensor([2, 1]),
        "contemplate_load": torch.tensor([1, 0, 4, 3]),
    }
    other = {"correct_so_far": torch.tensor([1, 0]), "rows_with_future": torch.tensor(1)}
    second = first | other | {"contemplate_load": nothing["contemplate_load"]}
    assert metrics_of(add_counts(add_counts(nothing, first), second)) == {
        "accuracy_0": 4 / 8,
        "accuracy_1": 2 / 4,
        "acceptance_0": round(3 / 8, 4),
        "acceptance_1": 1 / 4,
        "tau_greedy": 1 + 3 / 8 + 1 / 4,
        "future_coverage": 4 / 8,
        "contemplate_load_min": 0,
        "contemplate_load_max": 4 / 8,
    }
