"""Attention over a tree without a copy of keys and values for every query head.

Where several query heads share a key and value head, Transformers repeats keys and values for each of them as soon as
several rows attend under a mask: all of the text, in each layer and each round. Here the query heads of a group become
further rows of one head instead, which is the same sum.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


_lock = threading.Lock()
_users = 0
_NO_GROUPS = nn.Module()  # Transformers asks the module of an attention for its groups of heads


def grouped_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    Transformers' `sdpa` attention. Where several rows attend under one float mask for all heads, as only the masks of
    this package are, grouped heads are not repeated. Queries `(B, heads, T, hd)` -> `(B, T, heads, hd of values)`.
    """
    batch_size, num_heads, num_rows, head_dim = query.shape
    groups = getattr(module, "num_key_value_groups", 1)
    is_ours = attention_mask is not None and attention_mask.is_floating_point() and attention_mask.shape[1] == 1
    if groups == 1 or num_rows == 1 or not is_ours or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    output, _ = sdpa_attention_forward(
        _NO_GROUPS,
        query.reshape(batch_size, num_heads // groups, groups * num_rows, head_dim),
        key,
        value,
        attention_mask.repeat(1, 1, groups, 1),
        **kwargs,
    )  # (B, groups * T, kv heads, hd)
    output = output.unflatten(1, (groups, num_rows)).permute(0, 2, 3, 1, 4)  # (B, T, kv heads, groups, hd)
    return output.flatten(2, 3), None


@contextmanager
def without_repeated_heads() -> Iterator[None]:
    """Within it [`grouped_sdpa`] is what models find under the name `sdpa`, unless something else than Transformers'
    own is there; in other threads too, where it does for the masks of others what Transformers does."""
    global _users
    with _lock:
        _users += 1
        if ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward:
            ALL_ATTENTION_FUNCTIONS["sdpa"] = grouped_sdpa
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0 and ALL_ATTENTION_FUNCTIONS["sdpa"] is grouped_sdpa:
                del ALL_ATTENTION_FUNCTIONS["sdpa"]
