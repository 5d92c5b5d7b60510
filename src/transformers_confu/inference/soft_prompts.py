"""Soft prompts among a target's keys and values: their rotation, and a cache that shows them to one forward.

Shapes: B batch, R positions, S soft prompts.
"""

import inspect
import sys
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from .configuration_confu import full_attention_rope


class KeyRotation:
    r"""
    The rotation that a target's RoPE gives to its keys, for keys that no layer of it made: the soft prompts'.

    Args:
        target ([`PreTrainedModel`]): The target.

    Raises:
        ValueError: the target rotates no keys, or not in a way known here.
    """

    def __init__(self, target: PreTrainedModel):
        config, decoder = target.config.get_text_config(decoder=True), target.get_decoder()
        self.embedding = getattr(decoder, "rotary_emb", None)
        self.apply = getattr(sys.modules[type(self.embedding).__module__], "apply_rotary_pos_emb", None)
        rope = full_attention_rope(config)
        if self.apply is None or not rope or not all(getattr(config, "no_rope_layers", None) or [True]):
            raise ValueError(
                f"The draft's soft prompts are rotated by the target's RoPE (`rotate_soft_prompts=True`), but "
                f"{type(target).__name__} has none that serves every layer; use a draft with "
                "`rotate_soft_prompts=False`."
            )
        # Models that rotate each type of layer in its own way ask for the type; check_target lets one type pass.
        parameters = inspect.signature(self.embedding.forward).parameters
        self.of_type = {"layer_type": "full_attention"} if "layer_type" in parameters else {}
        self.share = rope.get("partial_rotary_factor", 1.0)

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
        num_layers, num_heads, num_slots, head_dim = keys.shape
        batch_size, num_positions = position_ids.shape
        positions = position_ids.to(keys.device).reshape(-1, 1)  # (B * R, 1)
        like = keys.to(torch.promote_types(keys.dtype, torch.float32))
        cos, sin = (
            angles.to(keys.device)  # (1 + B * R, 1, share of hd)
            for angles in self.embedding(like, nn.functional.pad(positions, (0, 0, 1, 0)), **self.of_type)
        )
        # At position 0 the cosine is 1, or the factor by which YaRN scales keys, which cached ones have already.
        cos, sin = cos[1:] / cos[:1], sin[1:] / cos[:1]
        states = keys.flatten(0, 1).expand(len(positions), -1, -1, -1)  # (B * R, layers * kv_heads, S, hd)
        rotated, kept = states.split([rotary := int(self.share * head_dim), head_dim - rotary], dim=-1)
        _, rotated = self.apply(rotated, rotated, cos, sin)
        states = torch.cat([rotated, kept], dim=-1).to(keys.dtype)
        states = states.view(batch_size, num_positions, num_layers, num_heads, num_slots, head_dim)
        return states.permute(2, 0, 3, 1, 4, 5).flatten(3, 4)


class SlotCache(DynamicCache):
    r"""
    A view of `cache` for one forward whose contemplate rows also read the soft prompts.

    Each layer holds cached rows, new rows and slots, in this order.

    Args:
        cache (`DynamicCache`): Shared, not copied.
        channel: Gives the slots of each layer.
        keep (`bool`): Store rows and slots in `cache`, to be compacted later; else leave `cache` as it is.
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
        slot_keys, slot_values = self.channel.slots(layer_idx, key_states, self.rotated_keys)
        before = layer.keys, layer.values
        keys, values = layer.update(
            torch.cat([key_states, slot_keys], dim=-2), torch.cat([value_states, slot_values], dim=-2)
        )
        if not self.keep:
            layer.keys, layer.values = before
        return keys, values
