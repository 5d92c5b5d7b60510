"""The frozen target: what it must be, and its forward over tree nodes and contemplate rows.

Shapes: B batch, P cached rows, N tree nodes, C contemplate rows, S soft prompts, Ht target width. Only the target's
modules are called and no weight is read, so quantised, offloaded, split and LoRA-wrapped targets work.
"""

import inspect
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.utils import ModelOutput

from .configuration_confu import STATIC_ROPE_TYPES, ConFuConfig
from .draft_tree import DraftTree


if TYPE_CHECKING:
    from .modeling_confu import ConFuFutureChannel


@dataclass
class Verification:
    r"""
    What one target forward says about a tree.

    Args:
        outputs: The target's outputs; `logits` and hidden states start with the N real rows.
        taps (`torch.FloatTensor` of shape `(batch, nodes, taps_size)`): Tapped hidden states of the real rows.
        futures (`torch.FloatTensor` of shape `(batch, contemplate rows, future_size)`, *optional*).
        prefix_length (`int`): Rows in the cache before this forward, P.
    """

    outputs: ModelOutput
    taps: torch.Tensor
    futures: torch.Tensor | None
    prefix_length: int


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
        rope = getattr(config, "rope_parameters", None)
        if self.apply is None or not rope or not all(getattr(config, "no_rope_layers", None) or [True]):
            raise ValueError(
                f"The draft's soft prompts are rotated by the target's RoPE (`rotate_soft_prompts=True`), but "
                f"{type(target).__name__} has none that serves every layer; use a draft with "
                "`rotate_soft_prompts=False`."
            )
        # Models that rotate each type of layer in its own way ask for the type; check_target lets one type pass.
        parameters = inspect.signature(self.embedding.forward).parameters
        self.of_type = {"layer_type": "full_attention"} if "layer_type" in parameters else {}
        self.share = rope.get("full_attention", rope).get("partial_rotary_factor", 1.0)

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

    Each layer concatenates once: cached rows, new rows, slots, in this order.

    Args:
        cache (`DynamicCache`): Shared, not copied.
        channel: Gives the slots of each layer.
        keep (`bool`): Store rows and slots in `cache`, to be compacted later; else leave `cache` as it is.
        rotated_keys (`torch.FloatTensor`, *optional*): See `ConFuFutureChannel.slots`.
    """

    def __init__(
        self,
        cache: DynamicCache,
        channel: "ConFuFutureChannel",
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
        keys = torch.cat([layer.keys, key_states, slot_keys], dim=-2)
        values = torch.cat([layer.values, value_states, slot_values], dim=-2)
        if self.keep:
            layer.keys, layer.values = keys, values
        return keys, values


class TargetRunner:
    r"""
    Runs a target for one ConFu draft.

    Args:
        target ([`PreTrainedModel`]): The target, see [`check_target`].
        config ([`ConFuConfig`]): The draft's configuration.
        channel: The draft's future channel; soft prompts and `[con]`.
        also_recorded: Indices of further hidden states that the caller of a forward wants.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        config: ConFuConfig,
        channel: "ConFuFutureChannel",
        also_recorded: Iterable[int] = (),
    ):
        self.target = target
        self.config = config
        self.channel = channel
        self.embed = target.get_input_embeddings()
        self.rotation = KeyRotation(target) if config.rotate_soft_prompts and config.num_soft_prompts else None
        self.recorded = sorted(
            {*config.target_hidden_state_indices, *config.future_hidden_state_indices, *also_recorded}
        )
        """Indices of the hidden states to record, for `output_hidden_states`."""
        self.asked_of_all = {"return_dict": True} | without_router_loss(target)
        """Options of every forward over rows that a mask of ours describes."""

    def taps(self, hidden_states: tuple[torch.Tensor | None, ...]) -> torch.Tensor:
        """Concatenated taps of recorded hidden states, `(B, rows, taps_size)`, on the draft's device and dtype."""
        return self._select(hidden_states, self.config.target_hidden_state_indices)

    def _select(self, hidden_states: tuple[torch.Tensor | None, ...], indices: list[int]) -> torch.Tensor:
        like = self.channel.soft_prompts
        return torch.cat([hidden_states[index].to(like.device, like.dtype) for index in indices], dim=-1)

    def contemplate(
        self,
        cache: DynamicCache,
        routed_by: torch.Tensor,
        position_ids: torch.LongTensor,
        root_positions: torch.LongTensor,
        visible: torch.BoolTensor,
    ) -> torch.Tensor:
        r"""
        Future predictions of contemplate rows behind rows that are all cached. The cache is left as it was.

        Args:
            cache ([`DynamicCache`]): P rows of the target.
            routed_by (`torch.FloatTensor` of shape `(batch, rows, taps_size)`): Taps that route `[con]`, row by row.
            position_ids (`torch.LongTensor` of shape `(batch, rows)`): One more than the position of the token that a
                row stands behind.
            root_positions (`torch.LongTensor` of shape `(batch, rows)`): Position of the root of the round that a row
                belongs to: one more than that of the token whose taps route it. Rotated soft prompts stand there.
            visible (`torch.BoolTensor` of shape `(batch, rows, P)`): Cached rows that a row sees.

        Returns:
            `torch.FloatTensor` of shape `(batch, rows, future_size)`.
        """
        # Their scores are not wanted, but a head is not asked for none. One index, and not the number 1, which makes a
        # slice: over several texts that is not contiguous, and the head's weight would be copied for each of them.
        keep: int | torch.Tensor = 1
        if can_name_logits(self.target):
            keep = torch.zeros(1, dtype=torch.long, device=input_device(self.target))
        outputs = self._contemplate(cache, routed_by, position_ids, root_positions, visible, logits_to_keep=keep)
        return self._select(outputs.hidden_states, self.config.future_hidden_state_indices)

    def foresee(
        self,
        cache: DynamicCache,
        routed_by: torch.Tensor,
        position_ids: torch.LongTensor,
        root_positions: torch.LongTensor,
        visible: torch.BoolTensor,
    ) -> torch.Tensor:
        """What the target itself would predict after contemplate rows, logits `(B, rows, V)`; see `contemplate`."""
        return self._contemplate(cache, routed_by, position_ids, root_positions, visible, logits_to_keep=0).logits

    def _contemplate(
        self,
        cache: DynamicCache,
        routed_by: torch.Tensor,
        position_ids: torch.LongTensor,
        root_positions: torch.LongTensor,
        visible: torch.BoolTensor,
        logits_to_keep: int | torch.LongTensor,
    ) -> ModelOutput:
        # Any token's embedding tells where and in what dtype the target wants its input.
        like = self.embed(torch.zeros(1, 1, dtype=torch.long, device=input_device(self.target)))
        embeddings = self.channel.contemplate_token(routed_by).to(like.device, like.dtype)
        num_rows = embeddings.shape[1]
        itself = torch.eye(num_rows, dtype=torch.bool, device=visible.device).expand(visible.shape[0], -1, -1)
        num_slots = self.config.num_soft_prompts
        if self.rotation is None:
            slots = itself.new_ones(*itself.shape[:2], num_slots)
        else:
            slots = itself.repeat_interleave(num_slots, dim=-1)  # each row has its round's: (B, rows, rows * S)
        return self.target(
            inputs_embeds=embeddings,
            attention_mask=additive_mask(torch.cat([visible, itself, slots], dim=-1), like=embeddings),
            position_ids=position_ids.to(embeddings.device),
            cache=self._with_slots(cache, root_positions, keep=False),
            use_cache=True,
            output_hidden_states=self.config.future_hidden_state_indices,
            **self.asked_of_all,
            **({"logits_to_keep": logits_to_keep} if self.target._supports_logits_to_keep() else {}),
        )

    def verify(
        self,
        tree: DraftTree,
        nodes: torch.LongTensor | None,
        routed_by: torch.Tensor,
        cache: DynamicCache,
        root_positions: torch.LongTensor,
        visible: torch.BoolTensor,
        output_attentions: bool = False,
    ) -> Verification:
        r"""
        One forward over [root and drafted nodes | contemplate rows]; all rows and slots end up in the cache.

        Node v at depth d sits at position n + d and sees the visible cache, its ancestors and itself. Its contemplate
        row sits at n + d + 1 and sees what v sees, v, itself and the soft prompts. No node sees a contemplate row or
        a soft prompt, so the target's own outputs do not change.

        Args:
            tree ([`DraftTree`]): The tree of N nodes.
            nodes (`torch.LongTensor` of shape `(batch, C)`, *optional*): Nodes with a contemplate row.
            routed_by (`torch.FloatTensor` of shape `(batch, taps_size)`): Taps of the newest token with a true hidden
                state; one `[con]` embedding serves all rows of the forward.
            cache ([`DynamicCache`]): P rows of the accepted prefix.
            root_positions (`torch.LongTensor` of shape `(batch,)`): Position n of the root.
            visible (`torch.BoolTensor` of shape `(batch, P)`): Cached rows that are no padding.
            output_attentions (`bool`): Return them, for the caller.
        """
        prefix_length = visible.shape[1]
        num_nodes = tree.size
        inputs_embeds = self.embed(tree.tokens.to(input_device(self.target)))  # (B, N, Ht)
        depths, sees = tree.depths, tree.ancestors
        written: Cache = cache
        if nodes is not None:
            num_rows = nodes.shape[1]
            contemplate = self.channel.contemplate_token(routed_by)[:, None, :].expand(-1, num_rows, -1)
            inputs_embeds = torch.cat([inputs_embeds, contemplate.to(inputs_embeds)], dim=1)
            depths = torch.cat([depths, depths.gather(1, nodes) + 1], dim=1)
            sees = self._rows_see(sees, nodes)
            written = self._with_slots(cache, root_positions[:, None], keep=True)
        prefix = visible[:, None, :].expand(-1, depths.shape[1], -1)
        outputs = self.target(
            inputs_embeds=inputs_embeds,
            attention_mask=additive_mask(torch.cat([prefix, sees], dim=-1), like=inputs_embeds),
            position_ids=(root_positions[:, None] + depths).to(inputs_embeds.device),
            cache=written,
            use_cache=True,
            output_hidden_states=self.recorded,
            **self.asked_of_all,
            **({"output_attentions": True} if output_attentions else {}),
            **(
                {"logits_to_keep": torch.arange(num_nodes, device=inputs_embeds.device)}
                if can_name_logits(self.target)
                else {}
            ),
        )
        return Verification(
            outputs=outputs,
            taps=self.taps(outputs.hidden_states)[:, :num_nodes],
            futures=None
            if nodes is None
            else self._select(outputs.hidden_states, self.config.future_hidden_state_indices)[:, num_nodes:],
            prefix_length=prefix_length,
        )

    def _with_slots(self, cache: DynamicCache, root_positions: torch.LongTensor, keep: bool) -> SlotCache:
        """`cache` with one set of soft prompts, or with one at each of `root_positions` `(B, R)` if they rotate."""
        rotated_keys = None
        if self.rotation is not None:
            rotated_keys = self.rotation(self.channel.soft_prompts[:, 0], root_positions)
        return SlotCache(cache, self.channel, keep, rotated_keys)

    def _rows_see(self, ancestors: torch.BoolTensor, nodes: torch.LongTensor) -> torch.BoolTensor:
        """Who sees whom among [N nodes | C contemplate rows | S slots]: `(B, N + C, N + C + S)`."""
        batch_size, num_nodes, _ = ancestors.shape
        num_rows, num_slots = nodes.shape[1], self.config.num_soft_prompts
        above = ancestors.gather(1, nodes[..., None].expand(-1, -1, num_nodes))  # (B, C, N)
        itself = torch.eye(num_rows, dtype=torch.bool, device=nodes.device).expand(batch_size, -1, -1)
        slots = itself.new_ones(batch_size, num_rows, num_slots)
        contemplate = torch.cat([above, itself, slots], dim=-1)
        return torch.cat([nn.functional.pad(ancestors, (0, num_rows + num_slots)), contemplate], dim=1)

    def compact(self, cache: DynamicCache, prefix_length: int, path: torch.LongTensor) -> None:
        """Keep the first P rows and, after them, the tree rows `path` `(length,)`, rising; drop all others."""
        length = path.shape[0]
        moves = bool((path != torch.arange(length, device=path.device)).any())
        for layer in cache.layers:
            if moves:
                rows = (prefix_length + path).to(layer.keys.device)
                layer.keys[..., prefix_length : prefix_length + length, :] = layer.keys[..., rows, :]
                layer.values[..., prefix_length : prefix_length + length, :] = layer.values[..., rows, :]
        crop(cache, prefix_length + length)


def crop(cache: DynamicCache, length: int) -> None:
    """Cut every layer to its first `length` rows, also where layers differ in length."""
    for layer in cache.layers:
        if layer.is_initialized:
            layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes of all keys and values."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.is_initialized)


def input_device(target: PreTrainedModel) -> torch.device:
    """Where to put inputs. An offloaded target has its weights on `meta`, and moves inputs from wherever they are."""
    return torch.device("cpu") if target.device.type == "meta" else target.device


def without_router_loss(target: PreTrainedModel) -> dict[str, bool]:
    """Options of a forward under a 4D mask, which the balancing loss of a mixture of experts cannot read."""
    takes_it = "output_router_logits" in inspect.signature(target.forward).parameters
    return {"output_router_logits": False} if takes_it else {}


def can_name_logits(target: PreTrainedModel) -> bool:
    """Whether a tensor may say which rows' logits are wanted: not if a device map puts the last states elsewhere."""
    is_split = len(set(getattr(target, "hf_device_map", {}).values())) > 1
    return target._supports_logits_to_keep() and not is_split


def additive_mask(sees: torch.BoolTensor, like: torch.Tensor) -> torch.Tensor:
    """`(B, queries, keys)` -> mask `(B, 1, queries, keys)`: 0 where a row sees, the lowest number elsewhere.

    Of the dtype and on the device of `like`. Always float: eager attention adds the mask, and adding a boolean one
    would give wrong scores without a word.
    """
    mask = torch.zeros(sees.shape, dtype=like.dtype, device=like.device)
    return mask.masked_fill_(~sees.to(like.device), torch.finfo(like.dtype).min)[:, None]


def check_target(target: PreTrainedModel, config: ConFuConfig) -> None:
    r"""
    Refuse a target that tree decoding with contemplate rows cannot serve, or that the draft was not made for.

    Raises:
        ValueError: in one sentence, what was found, why it cannot work, and what does.
    """
    name = type(target).__name__
    target_config = target.config.get_text_config(decoder=True)
    if target.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder model; ConFu drafts for decoder-only models.")
    if getattr(target, "_is_stateful", False):
        raise ValueError(
            f"{name} is stateful: it cannot return to an earlier state when a guess is refused, so no assisted "
            "generation works with it. Use a model with a key/value cache."
        )
    implementation = target_config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"{name} uses `attn_implementation='{implementation}'`, which cannot take the mask of a tree; load it "
            "with 'sdpa' or 'eager'."
        )
    layer_types = getattr(target_config, "layer_types", None) or []
    if unusual := sorted(set(layer_types) - {"full_attention"}):
        raise ValueError(
            f"{name} has layers of type {', '.join(unusual)}, whose cache cannot hold a tree; ConFu needs a target "
            "with full attention in every layer."
        )
    if not layer_types and getattr(target_config, "sliding_window", None) is not None:
        raise ValueError(
            f"{name} has `sliding_window={target_config.sliding_window}`, and a sliding cache cannot hold a tree; "
            "ConFu needs full attention (`sliding_window=None`)."
        )
    if getattr(target_config, "attention_layers", None) is not None:
        raise ValueError(
            f"{name} masks attention by the order of rows, whatever mask it is given, and the rows of a tree are in "
            "no such order; ConFu needs a target that follows the mask."
        )
    if getattr(target_config, "alibi", False):
        raise ValueError(
            f"{name} counts rows for its positions (`alibi=True`), and branches of a tree share positions; ConFu "
            "needs a target that follows `position_ids`."
        )
    rope = getattr(target_config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)  # some have one entry for each type of layer
    if rope.get("rope_type", "default") not in STATIC_ROPE_TYPES:
        raise ValueError(
            f"{name} uses RoPE type '{rope['rope_type']}', whose frequencies change with the length of the forward, "
            f"so cached keys would differ from plain decoding; types that work are {', '.join(STATIC_ROPE_TYPES)}."
        )
    if "mrope_section" in rope:
        raise ValueError(f"{name} uses 3-D positions (mrope), which a draft tree has not; use a text-only target.")
    if getattr(target_config, "hidden_size_per_layer_input", None):
        raise ValueError(
            f"{name} looks token ids up in every layer (`hidden_size_per_layer_input`), and a contemplate row has no "
            "id; use a target that reads its input embeddings only."
        )
    width = getattr(target.get_input_embeddings(), "embedding_dim", target_config.hidden_size)
    if width != target_config.hidden_size:
        raise ValueError(
            f"{name} has embeddings of size {width} and hidden states of size {target_config.hidden_size}; ConFu "
            "needs a target where both are the same."
        )
    parameters = inspect.signature(target.forward).parameters
    if missing := [p for p in ("inputs_embeds", "position_ids", "cache") if p not in parameters]:
        raise ValueError(f"{name}.forward takes no {', '.join(f'`{p}`' for p in missing)}, which a draft tree needs.")
    if getattr(target, "_tp_size", None) not in (None, 1):
        raise ValueError(
            f"{name} is loaded with tensor parallelism over {target._tp_size} processes, where every process would "
            "need the same tree; load it with `device_map` instead."
        )
    if config.rotate_soft_prompts and config.num_soft_prompts:
        KeyRotation(target)
    check_prompt_learning(getattr(target.prepare_inputs_for_generation, "__self__", target))
    adapters = getattr(target, "peft_config", None) or {}
    if any(getattr(adapter, "alora_invocation_tokens", None) for adapter in adapters.values()):
        raise ValueError(
            f"{name} has an activated LoRA (`alora_invocation_tokens`), which peft applies to the last rows of a "
            "forward, and those of a tree are not the text's last tokens; use a LoRA without it."
        )
    for field, ours in (
        ("vocab_size", config.vocab_size),
        ("hidden_size", config.target_hidden_size),
        ("num_hidden_layers", config.target_num_hidden_layers),
    ):
        if getattr(target_config, field) != ours:
            raise ValueError(
                f"The draft was made for a target with `{field}={ours}`, but {name} has "
                f"{getattr(target_config, field)}; load the target named in the draft's card, or train a draft for "
                "this one."
            )


def check_prompt_learning(target: torch.nn.Module) -> None:
    """ValueError for a peft model with virtual tokens of its own."""
    if getattr(getattr(target, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            f"{type(target).__name__} has an active peft prompt-learning adapter, whose virtual tokens shift every "
            "position; LoRA and other adapters of weights work."
        )


def check_cache(cache: Any, config: ConFuConfig) -> None:
    r"""
    Refuse a cache whose rows cannot be moved and dropped one by one.

    The type of each layer must be `DynamicLayer` itself: its subclasses store rows quantised, offloaded or windowed.
    """
    if isinstance(cache, DynamicCache) and not cache.offloading:
        layer_types = {type(layer) for layer in cache.layers}
        if layer_types <= {DynamicLayer}:
            for layer in cache.layers:
                if layer.get_seq_length() == 0:
                    continue
                ours = (config.target_num_key_value_heads, config.target_head_dim)
                keys, values = ((states.shape[1], states.shape[3]) for states in (layer.keys, layer.values))
                if keys != ours or values != ours:
                    of_values = "" if keys == values else f", and values of {values[0]} heads of size {values[1]}"
                    raise ValueError(
                        f"The target caches {keys[0]} key/value heads of size {keys[1]}{of_values}, but the draft's "
                        f"soft prompts are for {ours[0]} of size {ours[1]}; use the target that the draft was made "
                        "for."
                    )
            return
        found = ", ".join(sorted(layer_type.__name__ for layer_type in layer_types - {DynamicLayer}))
        found = f"a {type(cache).__name__} with layers of type {found}"
    else:
        found = f"{'an offloaded' if getattr(cache, 'offloading', False) else 'a'} {type(cache).__name__}"
    raise ValueError(
        f"ConFu decoding needs a plain, non-offloaded DynamicCache of full-attention layers, got {found}; leave "
        "`cache_implementation` and `cache` unset, or pass `DynamicCache()`."
    )
