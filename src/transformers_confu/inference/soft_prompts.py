"""Soft prompts among a target's keys and values: their rotation, and a cache that shows them to one forward.

Shapes: B batch, R positions, S soft prompts.
"""

import inspect
import sys
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from .cached_rows import cache_windows, rows_held, rows_read
from .configuration_confu import rope_of


# Families whose layers of full attention have no RoPE where others have a window, without saying so in a list.
ROTATE_IN_WINDOWS_ONLY = ("afmoe", "cohere2", "cohere2_moe", "exaone4", "exaone4_5", "exaone_moe", "flint", "kolibri1")


class KeyRotation:
    r"""
    The rotation that a target's RoPE gives to its keys, for keys that no layer of it made: the soft prompts'.

    Args:
        target ([`PreTrainedModel`]): The target.

    Raises:
        ValueError: the target rotates no keys, or not those of every layer, or not in a way known here.
    """

    def __init__(self, target: PreTrainedModel):
        config, decoder = target.config.get_text_config(decoder=True), target.get_decoder()
        self.embedding = getattr(decoder, "rotary_emb", None)
        self.apply = getattr(sys.modules[type(self.embedding).__module__], "apply_rotary_pos_emb", None)
        kinds = ["full_attention" if window is None else "sliding_attention" for window in cache_windows(config)]
        ropes = {kind: rope_of(config, kind) for kind in kinds}
        some_do_not = not all(getattr(config, "no_rope_layers", None) or [True])
        if len(ropes) > 1:
            some_do_not |= config.model_type in ROTATE_IN_WINDOWS_ONLY
        if self.apply is None or some_do_not or not all(ropes.values()):
            raise ValueError(
                f"The draft's soft prompts are rotated by the target's RoPE (`rotate_soft_prompts=True`), but "
                f"{type(target).__name__} has none that serves every layer; use a draft with "
                "`rotate_soft_prompts=False`."
            )
        self.layers = {kind: [layer for layer, of in enumerate(kinds) if of == kind] for kind in ropes}
        # "proportional" RoPE leaves a part of each head where it is by frequencies of 0.
        self.shares = {
            kind: 1.0 if rope.get("rope_type") == "proportional" else rope.get("partial_rotary_factor", 1.0)
            for kind, rope in ropes.items()
        }
        # Models that rotate each type of layer in its own way ask for the type.
        self.asks_for_type = "layer_type" in inspect.signature(self.embedding.forward).parameters
        # Most rotate queries and keys in one call.
        self.takes_queries = list(inspect.signature(self.apply).parameters).index("cos") == 2

    def __call__(self, keys: torch.Tensor, position_ids: torch.LongTensor) -> torch.Tensor:
        r"""
        Move keys from around position 0 to around other positions.

        Args:
            keys (`torch.FloatTensor` of shape `(layers, num_key_value_heads, S, head_dim)`): As the target would cache
                them near position 0.
            position_ids (`torch.LongTensor` of shape `(batch, R)`): Where to.

        Returns:
            `torch.FloatTensor` of shape `(layers, batch, num_key_value_heads, R * S, head_dim)`.
        """
        if len(self.layers) == 1:
            return self._rotate(keys, position_ids, next(iter(self.layers)))
        of_kinds = [self._rotate(keys[layers], position_ids, kind) for kind, layers in self.layers.items()]
        order = torch.tensor([layer for layers in self.layers.values() for layer in layers], device=keys.device)
        return torch.cat(of_kinds)[order.argsort()]

    def _rotate(self, keys: torch.Tensor, position_ids: torch.LongTensor, kind: str) -> torch.Tensor:
        """[`__call__`] for the keys of some layers, all of one kind."""
        num_layers, num_heads, num_slots, head_dim = keys.shape
        batch_size, num_positions = position_ids.shape
        positions = position_ids.to(keys.device).reshape(-1, 1)  # (B * R, 1)
        like = keys.to(torch.promote_types(keys.dtype, torch.float32))
        of_type = {"layer_type": kind} if self.asks_for_type else {}
        cos, sin = (
            angles.to(keys.device)  # (1 + B * R, 1, share of hd)
            for angles in self.embedding(like, nn.functional.pad(positions, (0, 0, 1, 0)), **of_type)
        )
        # At position 0 the cosine is 1, or the factor by which YaRN scales keys, which cached ones have already.
        cos, sin = cos[1:] / cos[:1], sin[1:] / cos[:1]
        states = keys.flatten(0, 1).expand(len(positions), -1, -1, -1)  # (B * R, layers * kv_heads, S, hd)
        rotated, kept = states.split([rotary := int(self.shares[kind] * head_dim), head_dim - rotary], dim=-1)
        rotated = self.apply(rotated, rotated, cos, sin)[1] if self.takes_queries else self.apply(rotated, cos, sin)
        states = torch.cat([rotated, kept], dim=-1).to(keys.dtype)
        states = states.view(batch_size, num_positions, num_layers, num_heads, num_slots, head_dim)
        return states.permute(2, 0, 3, 1, 4, 5).flatten(3, 4)


class SlotCache(DynamicCache):
    r"""
    A view of `cache` for one forward whose contemplate rows also read the soft prompts.

    Each layer gives cached rows, new rows and slots, in this order.

    Args:
        cache (`DynamicCache`): Shared, not copied.
        channel: Gives the slots of each layer.
        keep (`bool`): Store rows and slots in `cache`, to be compacted later, where layers with a window must be of
            [`~growing_cache.GrowingLayer`]; else leave `cache` as it is.
        rotated_keys (`torch.FloatTensor`, *optional*): See `ConFuFutureChannel.slots`.
    """

    def __init__(
        self,
        cache: DynamicCache,
        channel: nn.Module,
        keep: bool,
        rotated_keys: torch.Tensor | None = None,
    ):
        super().__init__()
        self.layers = cache.layers
        self.channel = channel
        self.keep = keep
        self.rotated_keys = rotated_keys

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        layer = self.layers[layer_idx]
        keys, values = [key_states], [value_states]
        if self.channel.soft_prompts.numel() > 0:
            slot_keys, slot_values = self.channel.slots(layer_idx, key_states, self.rotated_keys)
            keys.append(slot_keys)
            values.append(slot_values)
        if self.keep:
            return layer.update(torch.cat(keys, dim=-2), torch.cat(values, dim=-2))
        outside = rows_held(layer) - rows_read(layer)
        cached_keys, cached_values = layer.keys[..., outside:, :], layer.values[..., outside:, :]
        return torch.cat([cached_keys, *keys], dim=-2), torch.cat([cached_values, *values], dim=-2)
