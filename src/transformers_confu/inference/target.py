"""The frozen target: its forwards over tree nodes and contemplate rows, and the rows of its cache.

Shapes: B batch, P cached rows, N tree nodes, C contemplate rows, S soft prompts, Ht target width. Only the target's
modules are called and no weight is read, so quantised, offloaded, split and LoRA-wrapped targets work.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.utils import ModelOutput

from .cached_rows import crop, filled_layers, first_row_held, layer_windows, rows_read
from .configuration_confu import ConFuConfig, rope_of
from .draft_tree import DraftTree
from .recurrent_layers import BranchingStates, recurrent_mixers
from .row_inputs import RowInputs
from .soft_prompts import KeyRotation, SlotCache


@dataclass
class Verification:
    r"""
    What one target forward says about a tree.

    Args:
        outputs: The target's outputs; `logits` and hidden states start with the N real rows.
        taps (`torch.FloatTensor` of shape `(batch, nodes, taps_size)`): Tapped hidden states of the real rows.
        futures (`torch.FloatTensor` of shape `(batch, contemplate rows, future_size)`, *optional*).
        prefix_length (`int`): Rows in the cache before this forward, P.
        states ([`~recurrent_layers.BranchingStates`], *optional*): What the target's recurrent layers hold after each
            row, if it has some.
    """

    outputs: ModelOutput
    taps: torch.Tensor
    futures: torch.Tensor | None
    prefix_length: int
    states: BranchingStates | None


class TargetRunner:
    r"""
    Runs a target for one ConFu draft.

    Args:
        target ([`PreTrainedModel`]): The target, one that `checks.check_target` lets pass.
        config ([`ConFuConfig`]): The draft's configuration.
        channel: The draft's future channel; soft prompts and `[con]`.
        also_recorded: Indices of further hidden states that the caller of a forward wants.
        autocast: Makes a context for the target's forwards, see [`autocast_around`]; none by default.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        config: ConFuConfig,
        channel: nn.Module,
        also_recorded: Iterable[int] = (),
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.target = target
        self.autocast = autocast
        self.config = config
        self.channel = channel
        self.windows = layer_windows(target.config)
        self.num_positions = position_table_size(target)
        self.mixers = recurrent_mixers(target)
        self.embed = target.get_input_embeddings()
        self.row_inputs = RowInputs(target)
        self.rotation = KeyRotation(target) if config.rotate_soft_prompts and config.num_soft_prompts else None
        self.recorded = sorted(
            {*config.target_hidden_state_indices, *config.future_hidden_state_indices, *also_recorded}
        )
        """Indices of the hidden states to record, for `output_hidden_states`."""
        self.names_logits = can_name_logits(target)
        self.asked_of_all = {"return_dict": True} | without_router_loss(target)
        """Options of every forward over rows that a mask of ours describes."""

    def forward(self, states: BranchingStates | None = None, **inputs: Any) -> ModelOutput:
        """A forward of the target; with the `states` of the cache it is given, recurrent layers follow their tree."""
        with self.autocast(), nullcontext() if states is None else states.followed():
            return self.target(**inputs)

    def taps(self, hidden_states: tuple[torch.Tensor | None, ...]) -> torch.Tensor:
        """Concatenated taps of recorded hidden states, `(B, rows, taps_size)`, on the draft's device and dtype."""
        return self._select(hidden_states, self.config.target_hidden_state_indices)

    def _select(self, hidden_states: tuple[torch.Tensor | None, ...], indices: list[int]) -> torch.Tensor:
        like = self.channel.soft_prompts
        return torch.cat([main_stream(hidden_states[index]).to(like.device, like.dtype) for index in indices], dim=-1)

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
        if self.names_logits:
            keep = torch.zeros(1, dtype=torch.long, device=input_device(self.target))
        outputs = self._contemplate(cache, routed_by, position_ids, root_positions, visible, logits_to_keep=keep)
        futures = self._select(outputs.hidden_states, self.config.future_hidden_state_indices)
        return futures.unflatten(1, (position_ids.shape[1], -1)).flatten(2)  # (B, rows, ordered rows * F)

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
        batch_size, num_rows = position_ids.shape
        no_tokens = torch.zeros(batch_size, 0, dtype=torch.long, device=input_device(self.target))
        ordered = self.config.num_contemplate_rows  # behind each token, one after the other: a chain
        contemplate = self.channel.contemplate_token(routed_by).unflatten(-1, (ordered, -1)).flatten(1, 2)
        inputs = self.row_inputs(no_tokens, contemplate)
        itself = torch.eye(num_rows, dtype=torch.bool, device=visible.device).expand(batch_size, -1, -1)
        num_slots = self.config.num_soft_prompts
        if self.rotation is None:
            slots = itself.new_ones(*itself.shape[:2], num_slots)
        else:
            slots = itself.repeat_interleave(num_slots, dim=-1)  # each row has its round's: (B, rows, rows * S)
        # A row stands behind the last cached row that it sees.
        places = torch.arange(1, visible.shape[-1] + 1, device=visible.device).where(visible, 0).amax(dim=-1)
        read = self._with_slots(cache, root_positions, keep=False)
        if ordered > 1:
            nth = torch.arange(ordered, device=position_ids.device)
            position_ids = (position_ids[..., None] + nth).flatten(1)
            places = (places[..., None] + nth.to(places.device)).flatten(1)
            visible, slots = (sees.repeat_interleave(ordered, dim=1) for sees in (visible, slots))
            before = torch.ones(ordered, ordered, dtype=torch.bool, device=itself.device).tril()
            itself = torch.kron(itself[0].int(), before.int()).bool().expand(batch_size, -1, -1)
        with self._adapted():
            return self.forward(
                BranchingStates(self.mixers, read, [-1] * num_rows) if self.mixers else None,
                **inputs,
                attention_mask=self._masks(cache, visible, itself, slots, places, like=inputs["inputs_embeds"]),
                position_ids=position_ids.to(inputs["inputs_embeds"].device),
                cache=read,
                use_cache=True,
                output_hidden_states=self.config.future_hidden_state_indices,
                **self.asked_of_all,
                **({"logits_to_keep": logits_to_keep} if self.target._supports_logits_to_keep() else {}),
            )

    @contextmanager
    def _adapted(self) -> Iterator[None]:
        """Forwards whose rows are all contemplate rows: the MLP of each layer with its adapter beside it."""
        channel, handles = self.channel, []
        if self.config.contemplate_adapter_rank:
            pairs = zip(channel.contemplate_adapter_down, channel.contemplate_adapter_up, strict=True)
            for layer, (down, up) in zip(self.target.get_decoder().layers, pairs, strict=True):

                def beside(module: nn.Module, args: Any, output: torch.Tensor, down=down, up=up) -> torch.Tensor:
                    inputs = args[0]
                    return output + nn.functional.silu(inputs @ down.to(inputs).T) @ up.to(inputs).T

                handles.append(layer.mlp.register_forward_hook(beside))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

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
        One forward over [root and drafted nodes | contemplate rows]; all rows and slots end up in the cache, which
        has room to grow (see [`~growing_cache.let_grow`]) if layers have windows.

        Node v at depth d sits at position n + d and sees the visible cache, its ancestors and itself. Its contemplate
        row sits at n + d + 1 and sees what v sees, v, itself and the soft prompts. No node sees a contemplate row or
        a soft prompt, so the target's own outputs do not change. Where a layer has a sliding window, all this holds
        within it, but for the soft prompts, which no window hides.

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
        contemplate = None
        depths, sees = tree.depths, tree.ancestors
        slots = sees.new_zeros(*sees.shape[:2], 0)
        written: Cache = cache
        if nodes is not None:
            num_rows = nodes.shape[1]
            contemplate = self.channel.contemplate_token(routed_by)[:, None, :].expand(-1, num_rows, -1)
            depths = torch.cat([depths, depths.gather(1, nodes) + 1], dim=1)
            sees, slots = self._rows_see(sees, nodes)
            written = self._with_slots(cache, root_positions[:, None], keep=True)
        positions = root_positions[:, None] + depths
        if self.num_positions is not None:
            # Nodes beyond the longest text, which are never part of it, must find something in the table.
            positions = positions.minimum(root_positions[:, None].clamp(min=self.num_positions - 1))
        states = None
        if self.mixers:
            parents = [-1, *tree.parents[0, 1:].tolist(), *([] if nodes is None else nodes[0].tolist())]
            states = BranchingStates(self.mixers, written, parents)
        prefix = visible[:, None, :].expand(-1, depths.shape[1], -1)
        inputs = self.row_inputs(tree.tokens.to(input_device(self.target)), contemplate)
        inputs_embeds = inputs["inputs_embeds"]
        outputs = self.forward(
            states,
            **inputs,
            attention_mask=self._masks(cache, prefix, sees, slots, prefix_length + depths, like=inputs_embeds),
            position_ids=positions.to(inputs_embeds.device),
            cache=written,
            use_cache=True,
            output_hidden_states=self.recorded,
            **self.asked_of_all,
            **({"output_attentions": True} if output_attentions else {}),
            **({"logits_to_keep": torch.arange(num_nodes, device=inputs_embeds.device)} if self.names_logits else {}),
        )
        return Verification(
            outputs=outputs,
            taps=self.taps(outputs.hidden_states)[:, :num_nodes],
            futures=None
            if nodes is None
            else self._select(outputs.hidden_states, self.config.future_hidden_state_indices)[:, num_nodes:],
            prefix_length=prefix_length,
            states=states,
        )

    def _with_slots(self, cache: DynamicCache, root_positions: torch.LongTensor, keep: bool) -> SlotCache:
        """`cache` with one set of soft prompts, or with one at each of `root_positions` `(B, R)` if they rotate."""
        rotated_keys = None
        if self.rotation is not None:
            rotated_keys = self.rotation(self.channel.soft_prompts[:, 0], root_positions)
        return SlotCache(cache, self.channel, keep, rotated_keys)

    def _masks(
        self,
        cache: DynamicCache,
        cached: torch.BoolTensor,
        new: torch.BoolTensor,
        slots: torch.BoolTensor,
        places: torch.LongTensor,
        like: torch.Tensor,
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        r"""
        Additive masks over [cached rows | new rows | slots]: one, or for layers of two kinds one for each kind.

        A layer with a window has columns only for the cached rows that it still holds. Windows count rows of the text,
        as plain decoding does, where a tree's rows stand for those that the text would have at their depths.

        Args:
            cache ([`DynamicCache`]): Holds P rows.
            cached (`torch.BoolTensor` of shape `(batch, R, P)`): Cached rows that each of R new rows sees.
            new (`torch.BoolTensor` of shape `(batch, R, R)`): New rows that each of them sees.
            slots (`torch.BoolTensor` of shape `(batch, R, slots)`): Soft prompts that each of them sees.
            places (`torch.LongTensor` of shape `(batch, R)`): Which row of its text each new row is, from 0.
        """
        masks = {}
        for window, layer in zip(self.windows, cache.layers, strict=False):
            kind = "full_attention" if window is None else "sliding_attention"
            if kind in masks or layer not in filled_layers(cache):
                continue
            length = cached.shape[-1]
            first = length - rows_read(layer)
            sees_cached, sees_new = cached[..., first:], new
            if window is not None:
                nearest_hidden = places[..., None] - window
                sees_cached = sees_cached & (torch.arange(first, length, device=places.device) > nearest_hidden)
                sees_new = sees_new & (places[:, None, :] > nearest_hidden)
            masks[kind] = additive_mask(torch.cat([sees_cached, sees_new, slots], dim=-1), like)
        return masks if len(masks) > 1 else masks.popitem()[1]

    def _rows_see(
        self, ancestors: torch.BoolTensor, nodes: torch.LongTensor
    ) -> tuple[torch.BoolTensor, torch.BoolTensor]:
        """Who sees whom among [N nodes | C contemplate rows], `(B, N + C, N + C)`, and who sees slots, `(..., S)`."""
        batch_size, num_nodes, _ = ancestors.shape
        num_rows, num_slots = nodes.shape[1], self.config.num_soft_prompts
        above = ancestors.gather(1, nodes[..., None].expand(-1, -1, num_nodes))  # (B, C, N)
        itself = torch.eye(num_rows, dtype=torch.bool, device=nodes.device).expand(batch_size, -1, -1)
        sees = torch.cat([nn.functional.pad(ancestors, (0, num_rows)), torch.cat([above, itself], dim=-1)], dim=1)
        slots = itself.new_ones(batch_size, num_rows, num_slots)
        return sees, nn.functional.pad(slots, (0, 0, num_nodes, 0))

    def compact(self, cache: DynamicCache, prefix_length: int, path: list[int]) -> None:
        """Keep the P rows before the tree and, after them, the tree rows `path`, rising; drop all others."""
        length = len(path)
        if path != list(range(length)):
            for layer in filled_layers(cache):
                first = prefix_length - first_row_held(layer)
                rows = torch.tensor(path, device=layer.keys.device) + first
                layer.keys[..., first : first + length, :] = layer.keys[..., rows, :]
                layer.values[..., first : first + length, :] = layer.values[..., rows, :]
        crop(cache, prefix_length + length)


def input_device(target: PreTrainedModel) -> torch.device:
    """Where to put inputs. An offloaded target has its weights on `meta`, and moves inputs from wherever they are."""
    return torch.device("cpu") if target.device.type == "meta" else target.device


def main_stream(hidden_states: torch.Tensor) -> torch.Tensor:
    """Of Gemma 3n, whose layers carry several streams `(streams, B, rows, Ht)`, the one that they compute on."""
    return hidden_states[0] if hidden_states.dim() == 4 else hidden_states


def autocast_around(target: PreTrainedModel) -> Callable[[], AbstractContextManager]:
    """
    Makes contexts with the caller's autocast, for the target's forwards alone: all else is to run without it. A draft
    has a precision of its own, and under autocast `torch.cat` takes no half precision but one.
    """
    kind = input_device(target).type
    dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    return functools.partial(torch.autocast, kind, dtype=dtype, enabled=enabled)


def position_table_size(target: PreTrainedModel) -> int | None:
    """Positions of a target that looks them up in a table; `None` where RoPE computes them, without an end."""
    config = target.config.get_text_config(decoder=True)
    return None if rope_of(config) else getattr(config, "max_position_embeddings", None)


def without_router_loss(target: PreTrainedModel) -> dict[str, bool]:
    """Options of a forward under a 4D mask, which the balancing loss of a mixture of experts cannot read."""
    # Also of the class's own `forward`, as one put in its place may take anything and pass it on.
    takes_it = any(
        "output_router_logits" in inspect.signature(forward).parameters
        for forward in (target.forward, type(target).forward)
    )
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
