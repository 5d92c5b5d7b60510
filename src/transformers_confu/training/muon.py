"""Muon (https://kellerjordan.github.io/posts/muon) for the matrices inside of a draft, in step with another optimiser.

torch's own, of 2.9 and later, computes in bfloat16 everywhere: on a CPU without instructions for it a step of a draft
for SmolLM2-135M takes half a minute.
"""

from typing import Any

import torch
from torch import nn

from ..common.loading import default_dtype
from ..inference.modeling_confu import ConFuDraftModel


MUON_RATE = 2.0
"""Of Muon, in learning rates of AdamW: ahead of once and four times that, see docs/experiment.md."""

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Of the quintic that its author tuned: within five rounds singular values come to lie between 0.7 and 1.2."""


def matrices_within(draft: ConFuDraftModel) -> set[nn.Parameter]:
    """The weights of linear layers between embeddings and head, which are not among them."""
    linears = (module for module in draft.modules() if isinstance(module, nn.Linear) and module is not draft.lm_head)
    return {module.weight for module in linears}


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix with the same singular vectors and singular values near 1, by Newton and Schulz's iteration."""
    linear, cubic, quintic = NEWTON_SCHULZ
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = (wide / wide.norm().clamp(min=1e-7)).to(getattr(torch, default_dtype(matrix.device)))
    for _ in range(5):
        square = wide @ wide.T
        wide = linear * wide + (cubic * square + quintic * square @ square) @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


class Muon(torch.optim.Optimizer):
    """
    With Nesterov's momentum. Steps are as large as AdamW's, whose entries have a mean square of 0.2 or so: then both
    take the same learning rates and weight decay (arXiv 2502.16982, section 2.2).
    """

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["momentum"] = torch.zeros_like(matrix)
                momentum = state["momentum"].lerp_(matrix.grad, 1 - MOMENTUM)
                step = orthogonalize(matrix.grad.lerp(momentum, MOMENTUM))
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(step, alpha=-group["lr"] * 0.2 * max(matrix.shape) ** 0.5)


class MuonBeside(torch.optim.Optimizer):
    r"""
    An optimiser and, for some of its parameters, Muon in its place, as one: a schedule sees the groups of both.

    Args:
        rest (`torch.optim.Optimizer`): Made for all parameters; no step was taken yet.
        matrices (set of `nn.Parameter`): Of these, the ones that Muon takes over, at `MUON_RATE` times the learning
            rate of their group and with its weight decay.
    """

    def __init__(self, rest: torch.optim.Optimizer, matrices: set[nn.Parameter]):
        of_muon = []
        for group in rest.param_groups:
            taken = [parameter for parameter in group["params"] if parameter in matrices]
            if taken:
                rate, decay = group["lr"] * MUON_RATE, group["weight_decay"]
                of_muon.append({"params": taken, "lr": rate, "weight_decay": decay})
                group["params"] = [parameter for parameter in group["params"] if parameter not in matrices]
        self.parts = [rest, Muon(of_muon)] if of_muon else [rest]
        super().__init__(self._groups_of_parts(), {})

    def _groups_of_parts(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = self._groups_of_parts()  # which are others now
