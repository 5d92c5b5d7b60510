"""A cache whose layers have room to grow, for the time of the rounds.

`DynamicLayer` copies all keys and values of the text whenever rows are added; a round adds many and drops most.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


LEAST_ROOM = 256
"""Rows that a buffer has free at least when it is made; a long text gets a quarter of its length."""


class GrowingLayer(DynamicLayer):
    r"""
    A layer of a [`DynamicCache`] that writes new rows behind the old ones, into a buffer with room for more.

    `keys` and `values` are views of the buffer, so whoever shortens them or moves their rows works as on any layer.

    Args:
        layer (`DynamicLayer`): An initialised layer, whose rows are copied.
    """

    def __init__(self, layer: DynamicLayer):
        super().__init__()
        self.device, self.is_initialized = layer.device, True
        self.keys, self.values = layer.keys, layer.values
        self._make_room(layer.keys.shape[-2])

    def _make_room(self, rows: int) -> None:
        """New buffers for `rows` rows and more, with the present ones in them."""
        capacity = rows + max(LEAST_ROOM, rows // 4)
        length = self.keys.shape[-2]
        buffers = []
        for states in (self.keys, self.values):
            buffer = states.new_empty(*states.shape[:-2], capacity, states.shape[-1])
            buffer[..., :length, :] = states
            buffers.append(buffer)
        self._buffers = buffers
        self.keys, self.values = (buffer[..., :length, :] for buffer in buffers)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        length, total = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        if total > self._buffers[0].shape[-2]:
            self._make_room(total)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., length:total, :] = states
        self.keys, self.values = (buffer[..., :total, :] for buffer in self._buffers)
        return self.keys, self.values


@contextmanager
def room_to_grow(cache: DynamicCache) -> Iterator[None]:
    """Give `cache` layers that grow without copies; afterwards it has its own again, with the rows of then."""
    plain = list(cache.layers)
    cache.layers = [GrowingLayer(layer) if layer.is_initialized else layer for layer in plain]
    try:
        yield
    finally:
        for layer, grown in zip(plain, cache.layers, strict=True):
            if layer.is_initialized:
                layer.keys, layer.values = grown.keys.contiguous(), grown.values.contiguous()
        cache.layers = plain
