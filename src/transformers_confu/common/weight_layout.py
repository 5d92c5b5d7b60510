"""Weights packed so that a product of few rows is fast on a CPU.

The fp32 product of two to thirty rows with a weight as `nn.Linear` keeps it, which is what verifying a tree is, takes
up to three times as long as with the same weight in the order in which oneDNN, which torch brings along, reads it.
"""

import copy
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn


ROWS, OUT, IN = 8, 6144, 576  # as large as a layer of a small model, or as a matrix of a larger one


class _Packed:
    """A weight as oneDNN reads it, and of which values it was made: torch cannot copy such tensors."""

    def __init__(self, weight: torch.Tensor):
        # Kept, so that no later weight can come to lie at its address: of two casts the second often would.
        self.source, self.version = weight.detach(), weight._version
        self.weight = torch.ops.mkldnn._reorder_linear_weight(self.source, ROWS)

    def is_of(self, weight: torch.Tensor) -> bool:
        """Whether that is the weight, with the values of then."""
        return (weight.data_ptr(), weight._version) == (self.source.data_ptr(), self.version)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Packed":
        return self


class PackedLinear(nn.Linear):
    """A linear layer with a second copy of its weight, by which it multiplies while that is what its weight is."""

    packed: _Packed

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """`(..., in)` -> `(..., out)`"""
        if (
            torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or torch.compiler.is_compiling()
            or not self.packed.is_of(self.weight)
        ):
            return super().forward(states)
        return torch.ops.mkldnn._linear_pointwise(states, self.packed.weight, self.bias, "none", [], "")


def use_packed_weights(model: nn.Module) -> int:
    r"""
    Let the linear layers of a model multiply by packed copies of their weights, for decoding in fp32 on a CPU. The
    model is saved, moved and trained as before; results may differ by rounding. Only what is written through
    `weight.data`, as where an adapter is merged, goes unseen: do that before.

    Args:
        model (`nn.Module`): Layers of other dtypes and devices, and quantised ones, are left as they are.

    Returns:
        Bytes of the copies; 0 where nothing was packed.
    """
    size = 0
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if type(module) is nn.Linear and type(weight) is nn.Parameter and not weight.is_inference():
            if (weight.device.type, weight.dtype) == ("cpu", torch.float32):
                module.packed = _Packed(weight)
                module.__class__ = PackedLinear
                size += weight.nbytes
    return size


def copy_in_other_layout(model: nn.Module) -> nn.Module:
    """A copy whose linear layers have packed weights, or plain ones if those of `model` are packed."""
    other = copy.deepcopy(model)
    if not use_packed_weights(other):
        for module in other.modules():
            if type(module) is PackedLinear:
                module.__class__ = nn.Linear
                del module.packed
    return other


@cache
def packing_pays() -> bool:
    """Whether this CPU multiplies eight fp32 rows faster so; takes a fifth of a second."""
    if not torch.backends.mkldnn.is_available():
        return False
    linear, rows = nn.Linear(IN, OUT, bias=False), torch.ones(ROWS, IN)
    packed = copy_in_other_layout(linear)
    with torch.no_grad():
        return is_faster(lambda: packed(rows), than=lambda: linear(rows))


def is_faster(product: Callable[[], Any], than: Callable[[], Any]) -> bool:
    """Whether `than` takes a fifth longer at least, by the best of twenty turns: one of each, as what another product
    has read in between is no longer in the processor's caches in decoding either."""

    def seconds(product: Callable[[], Any]) -> float:
        started = time.thread_time()  # stands still while another process has the core
        product()
        return time.thread_time() - started

    pairs = [(seconds(product), seconds(than)) for _ in range(20)]
    return min(slow for _, slow in pairs) > 1.2 * min(fast for fast, _ in pairs)
