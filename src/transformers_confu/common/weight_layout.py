"""Weights laid out so that a product of few rows is fast on a CPU.

`nn.Linear` keeps its weight `(out, in)` row by row. On many CPUs the fp32 product of two to thirty rows with it, which
is what verifying a tree is, takes several times as long as with the same weight kept column by column.
"""

import copy
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn


ROWS, OUT, IN = 8, 1536, 576


def use_column_major_weights(model: nn.Module) -> int:
    r"""
    Lay the weights of all linear layers of a model out column by column, in place: the same parameters with the same
    shapes and values. The model is saved, moved and trained as before; results may differ by rounding.

    Args:
        model (`nn.Module`): Quantised and offloaded layers are left as they are.

    Returns:
        How many weights were laid out.
    """
    weights = {
        id(module.weight): module.weight
        for module in model.modules()
        if type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and module.weight.is_contiguous()
        and module.weight.device.type != "meta"
    }
    for weight in weights.values():
        weight.data = weight.data.t().contiguous().t()
    if weights:
        model.register_state_dict_post_hook(_row_major)
    return len(weights)


def _row_major(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    """A state dict as it would be without this file: Transformers cannot save tied weights of another layout."""
    copies: dict[int, torch.Tensor] = {}  # one for all names of a tied weight, which is then saved once
    for name, tensor in state_dict.items():
        if isinstance(tensor, torch.Tensor) and not tensor.is_contiguous():
            if tensor.data_ptr() not in copies:
                copies[tensor.data_ptr()] = tensor.contiguous()
            state_dict[name] = copies[tensor.data_ptr()]


def copy_in_other_layout(model: nn.Module) -> nn.Module:
    """A copy whose linear layers have their weights column by column, or row by row if all those of `model` do not."""
    other = copy.deepcopy(model)
    if not use_column_major_weights(other):
        for module in other.modules():
            if type(module) is nn.Linear:
                module.weight.data = module.weight.data.contiguous()
    return other


@cache
def column_major_pays() -> bool:
    """Whether this CPU multiplies eight fp32 rows faster so; takes some milliseconds."""
    weight, rows = torch.ones(OUT, IN), torch.ones(ROWS, IN)
    column_major = weight.t().contiguous().t()
    return is_faster(lambda: nn.functional.linear(rows, column_major), than=lambda: nn.functional.linear(rows, weight))


def is_faster(product: Callable[[], Any], than: Callable[[], Any]) -> bool:
    """Whether `than` takes a fifth longer at least, by the best of six turns of ten products each."""

    def seconds(product: Callable[[], Any]) -> float:
        started = time.thread_time()  # stands still while another process has the core
        for _ in range(10):
            product()
        return time.thread_time() - started

    pairs = [(seconds(product), seconds(than)) for _ in range(6)]
    return min(slow for _, slow in pairs) > 1.2 * min(fast for fast, _ in pairs)
