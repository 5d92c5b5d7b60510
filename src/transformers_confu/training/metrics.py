"""What training and evaluation report: counts that add up over batches and processes, and the shares made of them."""

import torch

from ..inference.configuration_confu import ConFuConfig


Counts = dict[str, torch.Tensor]
r"""
Sums, without gradients. Each has its shape from the start, so that processes can add theirs whatever they saw.

- `loss` (scalar): over rows and, weighted, over steps.
- `rows`, `rows_with_future` (scalars): draft rows, and how many read a future prediction.
- `counted` `(steps,)`: rows that have a target at each step.
- `correct` `(steps,)`: rows where the draft's first choice is the target's. A target outside the draft vocabulary is a
  miss.
- `correct_so_far` `(steps,)`: rows that are right at this step and all before.
- `accepted_so_far` `(steps,)`: over rows, the probability that this step and all before are accepted in sampling at
  temperature 1.
- `contemplate_load`, `future_load` `(experts,)`: how often the router of `[con]`, and that of `[f]`, chose each.
"""


def no_counts(config: ConFuConfig, num_steps: int) -> Counts:
    """Zeros, for a draft of this configuration and so many TTT steps."""
    steps = torch.zeros(num_steps, dtype=torch.long)
    return {
        "loss": torch.zeros(()),
        "rows": torch.zeros((), dtype=torch.long),
        "rows_with_future": torch.zeros((), dtype=torch.long),
        "counted": steps,
        "correct": steps,
        "correct_so_far": steps,
        "accepted_so_far": steps.float(),
        "contemplate_load": torch.zeros(config.num_contemplate_experts, dtype=torch.long),
        "future_load": torch.zeros(config.num_future_experts, dtype=torch.long),
    }


def add_counts(one: Counts, other: Counts) -> Counts:
    """Their sums, on the devices of the other."""
    return {name: one[name].to(value.device) + value for name, value in other.items()}


def metrics_of(counts: Counts) -> dict[str, float]:
    r"""
    Shares of what was counted; nothing if nothing was.

    - `accuracy_s`: the draft's first choice at step s is the target's, over the full vocabulary. What the draft
      vocabulary lacks is a miss. In stage `contemplation` `accuracy_0` is how often a contemplate row foresees the
      token after the next.
    - `acceptance_s`: the first choices at step s and all steps before are the target's.
    - `tau_greedy`: 1 + the sum of `acceptance_s`. What a chain of `num_steps` tokens would emit in a round at
      temperature 0, teacher-forced. (`confu evaluate` decodes with a tree, whose tau is higher.)
    - `tau_probabilistic`: the same for sampling at temperature 1, where the token of step s is accepted with
      probability 1 - TV_s (total variation between target and draft).
    - `future_coverage`: draft rows that read a future prediction.
    - `contemplate_load_min`, `..._max`, `future_load_...`: the least and the greatest share of one expert in what the
      router of `[con]`, and that of `[f]`, chose: 1 / K where it always chooses the same K.
    """
    if counts["rows"] == 0:
        return {}
    counted = counts["counted"].clamp(min=1)
    metrics: dict[str, float] = {}
    for name, numerator in (("accuracy", "correct"), ("acceptance", "correct_so_far")):
        shares = (counts[numerator] / counted).tolist()
        metrics |= {f"{name}_{step}": round(share, 4) for step, share in enumerate(shares)}
    for name, numerator in (("tau_greedy", "correct_so_far"), ("tau_probabilistic", "accepted_so_far")):
        if name == "tau_greedy" or counts[numerator].any():  # stage contemplation does not count the latter
            metrics[name] = round(1 + float((counts[numerator] / counted).sum()), 4)
    metrics["future_coverage"] = round(float(counts["rows_with_future"] / counts["rows"]), 4)
    for name in ("contemplate_load", "future_load"):
        if (load := counts[name]).any():
            shares = load / load.sum()
            metrics |= {f"{name}_min": round(float(shares.min()), 4), f"{name}_max": round(float(shares.max()), 4)}
    return metrics
