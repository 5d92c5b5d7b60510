"""What training and evaluation report: sums over batches and processes, and the shares made of them."""

import torch
from accelerate import Accelerator

from ..inference.configuration_confu import ConFuConfig
from .objective import Objective


class Counts:
    r"""
    Sums over batches. Every sum has its shape from the start, so that processes can add theirs whatever they saw.

    Args:
        config ([`ConFuConfig`]): Of the draft.
        num_steps (`int`): TTT steps.
    """

    def __init__(self, config: ConFuConfig, num_steps: int):
        steps = torch.zeros(num_steps, dtype=torch.long)
        self.config = config
        self.sums: dict[str, torch.Tensor] = {
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

    def add(self, objective: Objective) -> None:
        """Add the sums of one batch."""
        sums = {name: getattr(objective, name, None) for name in self.sums} | {"loss": objective.loss_sum}
        for name, value in sums.items():
            if value is not None:
                value = torch.as_tensor(value).detach()
                self.sums[name] = self.sums[name].to(value.device) + value

    def over_processes(self, accelerator: Accelerator) -> "Counts":
        """The sums of all processes; every process must ask for them."""
        total = Counts(self.config, len(self.sums["counted"]))
        own = {name: value.to(accelerator.device) for name, value in self.sums.items()}
        total.sums = {name: value.cpu() for name, value in accelerator.reduce(own, reduction="sum").items()}
        return total

    @property
    def loss(self) -> float:
        """Loss per draft row."""
        return float(self.sums["loss"] / self.sums["rows"].clamp(min=1))

    def metrics(self) -> dict[str, float]:
        r"""
        Shares of what was counted; nothing if nothing was.

        - `accuracy_s`: the draft's first choice at step s is the target's, over the full vocabulary. What the draft
          vocabulary lacks is a miss. In stage `contemplation` `accuracy_0` is how often a contemplate row foresees
          the token after the next.
        - `acceptance_s`: the first choices at step s and all steps before are the target's.
        - `tau_greedy`: 1 + the sum of `acceptance_s`. What a chain of `num_steps` tokens would emit in a round at
          temperature 0, teacher-forced. (`confu evaluate` decodes with a tree, whose tau is higher.)
        - `tau_probabilistic`: the same for sampling at temperature 1, where the token of step s is accepted with
          probability 1 - TV_s (total variation between target and draft).
        - `future_coverage`: draft rows that read a future prediction.
        - `contemplate_load_min`, `..._max`, `future_load_...`: the least and the greatest share of one expert in what
          the router of `[con]`, and that of `[f]`, chose. A router that always chooses the same K experts shows a
          greatest share of 1 / K.
        """
        if self.sums["rows"] == 0:
            return {}
        counted = self.sums["counted"].clamp(min=1)
        metrics: dict[str, float] = {}
        for name, numerator in (("accuracy", "correct"), ("acceptance", "correct_so_far")):
            shares = (self.sums[numerator] / counted).tolist()
            metrics |= {f"{name}_{step}": round(share, 4) for step, share in enumerate(shares)}
        for name, numerator in (("tau_greedy", "correct_so_far"), ("tau_probabilistic", "accepted_so_far")):
            if name == "tau_greedy" or self.sums[numerator].any():  # stage contemplation does not count the latter
                metrics[name] = round(1 + float((self.sums[numerator] / counted).sum()), 4)
        metrics["future_coverage"] = round(float(self.sums["rows_with_future"] / self.sums["rows"]), 4)
        for name in ("contemplate_load", "future_load"):
            load = self.sums[name]
            if load.sum() > 0:
                shares = load / load.sum()
                metrics |= {f"{name}_min": round(float(shares.min()), 4), f"{name}_max": round(float(shares.max()), 4)}
        return metrics
