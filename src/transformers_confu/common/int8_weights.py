"""A draft whose weights are rounded to eight bits, for decoding on a CPU, where a draft waits for its weights.

The text is the target's own whatever the draft proposes; the rounding changes which of its tokens are accepted.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .weight_layout import is_faster


MULTIPLE = 32  # of what the kernel reads and writes at once; it does not look whether there is as much
LEAST_WEIGHTS = 2**20  # of a head: smaller ones stay in the processor's caches, rounded or not


class Int8Linear(nn.Module):
    r"""
    A linear layer without bias, for a few rows of bf16 on a CPU.

    Args:
        weight (`torch.Tensor` of shape `(out, in)`): Rounded to 127 steps of either sign, of a size for
            each output.
    """

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        weight = weight.detach().float()
        scales = (weight.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny).bfloat16()
        # Divided by the scale as bf16 rounds it, which may be too small for the largest number.
        steps = (weight / scales.float()[:, None]).round().clamp(-127, 127)
        self.register_buffer("steps", steps.to(torch.int8))
        self.register_buffer("scales", scales)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """`(..., in)` -> `(..., out)`, both bf16"""
        rows = states.reshape(-1, states.shape[-1])
        return torch._weight_int8pack_mm(rows, self.steps, self.scales).view(*states.shape[:-1], -1)


def use_int8_weights(draft: PreTrainedModel) -> int:
    r"""
    Round the weights of a draft's linear layers to eight bits, in place, for decoding on a CPU.

    Args:
        draft ([`ConFuDraftModel`]): In bf16. It cannot be saved or trained afterwards; load it anew for that. Layers
            with a bias, or of sizes that are no multiples of 32, are left as they are.

    Returns:
        How many weights were rounded.
    """
    if (draft.device.type, draft.dtype) != ("cpu", torch.bfloat16):
        raise ValueError(
            f"The draft is in {draft.dtype} on {draft.device.type}, and weights of eight bits are for bf16 on a CPU; "
            "load it with `dtype=torch.bfloat16`."
        )
    rounded = 0
    for module in list(draft.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is nn.Linear and layer.bias is None and not any(s % MULTIPLE for s in layer.weight.shape):
                setattr(module, name, Int8Linear(layer.weight))
                rounded += 1
    if rounded:
        draft.register_state_dict_pre_hook(_refuse_to_save)
    return rounded


def _refuse_to_save(module: nn.Module, prefix: str, keep_vars: bool) -> Any:
    raise ValueError("This draft's weights were rounded to eight bits, for decoding only; load it anew to save it.")


def int8_pays(draft: PreTrainedModel) -> bool:
    """Whether this CPU multiplies four rows with the draft's head, in its present form, more slowly than rounded."""
    weight = draft.lm_head.weight
    if draft.device.type != "cpu" or weight.numel() < LEAST_WEIGHTS or any(size % MULTIPLE for size in weight.shape):
        return False
    rows, rounded = torch.ones(4, weight.shape[1]), Int8Linear(weight)
    of_dtypes = rows.to(weight.dtype), rows.bfloat16()
    with torch.no_grad():
        return is_faster(lambda: rounded(of_dtypes[1]), than=lambda: nn.functional.linear(of_dtypes[0], weight))
