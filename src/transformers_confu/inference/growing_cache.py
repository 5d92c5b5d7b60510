"""A cache whose layers have room to grow, for the time of the rounds.

`DynamicLayer` copies all keys and values of the text whenever rows are added; a round adds many and drops most. And
`DynamicSlidingWindowLayer` drops rows as others are added, though a round may refuse those.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .cached_rows import first_row_held, rows_held, rows_read
from .recurrent_layers import recurrent_layers


LEAST_ROOM = 256
"""Rows that a buffer has free at least when it is made; a long text gets a quarter of its length."""


class GrowingLayer(DynamicLayer):
    r"""
    A layer of a [`DynamicCache`] that writes new rows behind the old ones, into a buffer with room for more.

    `keys` and `values` are views of the buffer, so whoever shortens them or moves their rows works as on any layer.
    Rows outside a sliding window are only dropped when the next rows are added, by when those before are the text.

    Args:
        layer (`DynamicLayer`): An initialised layer, whose rows are copied.
    """

    def __init__(self, layer: DynamicLayer):
        super().__init__()
        self.device, self.is_initialized = layer.device, True
        self.is_sliding = layer.is_sliding
        self.sliding_window = getattr(layer, "sliding_window", None)
        self.keys, self.values = layer.keys, layer.values
        self._dropped = first_row_held(layer)
        self._make_room(rows_held(self))

    def get_seq_length(self) -> int:
        """Rows of the text so far, those outside the window included."""
        return self._dropped + self.keys.shape[-2]

    def _make_room(self, rows: int) -> None:
        """New buffers for `rows` rows and more, with the present ones in them."""
        capacity = rows + max(LEAST_ROOM, rows // 4)
        length = rows_held(self)
        buffers = []
        for states in (self.keys, self.values):
            buffer = states.new_empty(*states.shape[:-2], capacity, states.shape[-1])
            buffer[..., :length, :] = states
            buffers.append(buffer)
        self._buffers, self._start = buffers, 0  # the present rows begin at row `_start` of the buffers
        self.keys, self.values = (buffer[..., :length, :] for buffer in buffers)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        outside = rows_held(self) - rows_read(self)
        self.keys, self.values = self.keys[..., outside:, :], self.values[..., outside:, :]
        self._dropped, self._start = self._dropped + outside, self._start + outside
        total = rows_held(self) + key_states.shape[-2]
        # What was made in inference mode, by an earlier turn, cannot be written to outside of it.
        frozen = self._buffers[0].is_inference() and not torch.is_inference_mode_enabled()
        if frozen or self._start + total > self._buffers[0].shape[-2]:
            self._make_room(total)
        first_new, end = self._start + rows_held(self), self._start + total
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., first_new:end, :] = states
        self.keys, self.values = (buffer[..., self._start : end, :] for buffer in self._buffers)
        return self.keys, self.values


def let_grow(cache: DynamicCache) -> None:
    """
    Give `cache` layers that grow without copies, for good: for caches that nobody else will use. Layers that hold a
    state besides their rows stay as they are.
    """
    for layer in recurrent_layers(cache).values():
        if layer.record_past:  # as assisted generation of Transformers leaves layers of convolutions
            layer.crop(0)
            layer.record_past = False
    growing = (DynamicLayer, DynamicSlidingWindowLayer)
    cache.layers = [
        GrowingLayer(layer) if type(layer) in growing and layer.keys is not None else layer for layer in cache.layers
    ]


@contextmanager
def room_to_grow(cache: DynamicCache) -> Iterator[None]:
    """Give `cache` layers that grow without copies; afterwards it has its own again, with the rows of then."""
    plain = list(cache.layers)
    let_grow(cache)
    try:
        yield
    finally:
        for layer, grown in zip(plain, cache.layers, strict=True):
            if grown is not layer:
                outside = rows_held(grown) - rows_read(grown)
                layer.keys = grown.keys[..., outside:, :].contiguous()
                layer.values = grown.values[..., outside:, :].contiguous()
                if layer.is_sliding:
                    # As after plain `generate`: `crop` then says that the rows it would need are gone.
                    layer.cumulative_length, layer.record_past = grown.get_seq_length(), False
        cache.layers = plain
