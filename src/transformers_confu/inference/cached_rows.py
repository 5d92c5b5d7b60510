"""Which rows of a text the layers of a target's cache hold, with and without a sliding window.

A row of a layer with a window of W sees itself and the W - 1 rows before it, so between two forwards such a layer
holds the last W - 1 rows of the text; a layer with full attention holds all of them. Everything here works on both:
the first row that a layer holds is row `get_seq_length() - keys.shape[-2]` of the text. Layers of hybrid targets that
hold no rows, but a state or nothing, are passed over.
"""

import copy
from collections.abc import Callable

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from .configuration_confu import size_of
from .recurrent_layers import STATE_FIELDS, recurrent_layers, state_bytes


def layer_windows(target_config: PreTrainedConfig) -> list[int | None]:
    r"""
    The sliding window of each layer of a target, `None` for full attention.

    Raises:
        ValueError: windows differ in size.
    """
    config = target_config.get_text_config(decoder=True)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return [size_of(config, "sliding_window")] * config.num_hidden_layers
    window = size_of(config, "sliding_window") if "sliding_attention" in layer_types else None
    return [window if layer_type == "sliding_attention" else None for layer_type in layer_types]


def cache_windows(target_config: PreTrainedConfig) -> list[int | None]:
    """[`layer_windows`] of the layers that cache rows; others read the keys and values of such a one, or none."""
    modes = getattr(target_config.get_text_config(decoder=True), "kv_sharing_modes", None)
    windows = layer_windows(target_config)
    return [
        windows[layer] for layer in layers_with_attention(target_config) if modes is None or modes[layer] != "reuse"
    ]


def layers_with_attention(target_config: PreTrainedConfig) -> list[int]:
    """Numbers of the layers that attend to other rows: not the recurrent ones, nor those that see one row alone."""
    config = target_config.get_text_config(decoder=True)
    layer_types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [
        layer
        for layer, layer_type in enumerate(layer_types)
        if layer_type not in ("linear_attention", "conv", "moe", "mlp")
    ]


def filled_layers(cache: DynamicCache) -> list[DynamicLayer]:
    """The layers that hold keys and values: not before their first row, and not those that have none of their own."""
    return [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]


def rows_held(layer: DynamicLayer) -> int:
    """Rows of the text that a layer holds, which may be fewer than there are, or than its buffer has."""
    return min(layer.keys.shape[-2], layer.get_seq_length()) if layer.is_initialized else 0


def rows_read(layer: DynamicLayer) -> int:
    """Rows of the text that the next forward reads from a layer: the last of those that it holds."""
    window = getattr(layer, "sliding_window", None)
    return rows_held(layer) if window is None else min(rows_held(layer), window - 1)


def first_row_held(layer: DynamicLayer) -> int:
    """The number, in the text, of the first row that a layer holds."""
    return layer.get_seq_length() - rows_held(layer)


def crop(cache: DynamicCache, length: int) -> None:
    """Cut every layer, of no fixed shape, to the first `length` rows of the text, also where they differ in length."""
    for layer in filled_layers(cache):
        kept = max(length - first_row_held(layer), 0)
        layer.keys, layer.values = layer.keys[..., :kept, :], layer.values[..., :kept, :]


def lengthen(cache: DynamicCache, length: int) -> None:
    """Let `cache` be that of a text of `length` rows, which repeat those that it holds: to measure, not to decode."""
    for layer in filled_layers(cache):
        window = getattr(layer, "sliding_window", None)
        rows = length if window is None else min(length, window - 1)
        places = torch.arange(rows, device=layer.keys.device) % rows_held(layer)
        layer.keys, layer.values = layer.keys[..., places, :], layer.values[..., places, :]
        if window is not None:
            layer.cumulative_length = length


def way_back(cache: DynamicCache) -> Callable[[], None]:
    """
    A function that gives `cache` its present rows back, after forwards that added rows to it.

    Rows of a layer with full attention stay where they are and are only cut. A layer with a window drops rows while
    it takes others, so what it holds now is kept aside; that costs no copy, as it makes new tensors for its rows. A
    recurrent layer writes over its state, of which a copy is kept.
    """
    length = cache.get_seq_length()
    kept = [(layer, dict(vars(layer))) for layer in cache.layers if getattr(layer, "is_sliding", False)]
    for layer in recurrent_layers(cache).values():
        kept.append((layer, {name: copy.deepcopy(getattr(layer, name)) for name in STATE_FIELDS}))

    def restore() -> None:
        crop(cache, length)
        for layer, fields in kept:
            vars(layer).update(fields)

    return restore


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes of all keys, values and states."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in filled_layers(cache)) + state_bytes(cache)


def row_bytes(cache: DynamicCache) -> int:
    """Bytes of one row's keys and values, in all layers together."""
    return sum(
        (layer.keys.nbytes + layer.values.nbytes) // rows_held(layer)
        for layer in filled_layers(cache)
        if rows_held(layer) > 0
    )
