"""Recurrent layers of hybrid targets over trees: gated delta nets, Mamba mixers, short convolutions.

Such a layer holds no rows of the text but one state, which every token changes and from which no way leads back. In a
tree the state of a node comes from its parent's. So these layers alone go through a tree level by level, each level by
the layer's own step of plain decoding: its k rows are k texts of one token, each with the state of its parent. After
the walk the text's state is that of the last accepted node.

What a layer projects, row by row, needs no states: rows of all levels behind the first are projected together, so that
weights are not read again for every level.
"""

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.hooks import RemovableHandle
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin


STATE_FIELDS = (
    *("conv_states", "recurrent_states", "is_conv_states_initialized", "is_recurrent_states_initialized"),
    *("has_previous_state", "conv_kernel_size", "record_past"),
)
"""What a recurrent layer of a cache has besides its rows, if it has some."""


def recurrent_layers(cache: Cache) -> dict[int, LinearAttentionCacheLayerMixin]:
    """The layers of a cache that hold a state, by their numbers."""
    return {
        index: layer for index, layer in enumerate(cache.layers) if isinstance(layer, LinearAttentionCacheLayerMixin)
    }


def state_bytes(cache: Cache) -> int:
    """Bytes of the states of all recurrent layers: what one text keeps, and each node of a tree besides."""
    return sum(
        state.nbytes
        for layer in recurrent_layers(cache).values()
        for state in (*layer.conv_states.values(), *layer.recurrent_states.values())
        if state is not None
    )


def recurrent_mixers(target: PreTrainedModel) -> dict[int, nn.Module]:
    """The module of each recurrent layer of a target, by the layer's number; empty for targets without such layers."""
    return {
        module.layer_idx: module
        for module in target.modules()
        # All have a convolution over the newest tokens, and attention has none.
        if hasattr(module, "conv_kernel_size") and isinstance(getattr(module, "layer_idx", None), int)
    }


class BranchingStates:
    r"""
    The states of a target's recurrent layers during one forward over a tree, and after it.

    Args:
        mixers (`dict[int, nn.Module]`): See [`recurrent_mixers`].
        cache ([`Cache`]): What the forward is given; of a text that has begun. Its states stay as they are until
            [`~BranchingStates.keep`].
        parents (`list[int]`): For each row of the forward the row before it in its text, which comes earlier; -1 for
            rows that follow the cached text.
    """

    def __init__(self, mixers: dict[int, nn.Module], cache: Cache, parents: list[int]):
        self.cache = cache
        depths: list[int] = []
        for parent in parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        levels: list[list[int]] = [[] for _ in range(max(depths) + 1)]  # rows of each
        self.places: list[tuple[int, int]] = []
        """Level of each row, and its number there."""
        for row, depth in enumerate(depths):
            self.places.append((depth, len(levels[depth])))
            levels[depth].append(row)
        # For each row of each level the number of its parent in the level before.
        above = [
            [0 if depth == 0 else self.places[parents[row]][1] for row in rows] for depth, rows in enumerate(levels)
        ]
        self.layers = {index: _BranchingLayer(cache, index, levels, above) for index in mixers}
        self.mixers = mixers

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Within it the recurrent layers of a forward with this cache follow the tree; other forwards are as ever."""
        handles: list[RemovableHandle] = []
        try:
            for index, mixer in self.mixers.items():
                layer = self.layers[index]
                # First in and last out, so that the hooks of others see every row once.
                handles.append(mixer.register_forward_pre_hook(layer.enter, with_kwargs=True, prepend=True))
                handles.append(mixer.register_forward_hook(layer.leave, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def keep(self, row: int) -> None:
        """Make the state after `row` that of the text."""
        level, number = self.places[row]
        for index, layer in self.layers.items():
            text, branches = self.cache.layers[index], layer.branches[level]
            for kept, states in (
                (text.conv_states, branches.conv_states),
                (text.recurrent_states, branches.recurrent_states),
            ):
                for name, state in kept.items():
                    if state is not None:
                        state.copy_(states[name][number : number + 1])


class _BranchingLayer:
    """
    One recurrent layer during one forward: two hooks of its module, between which it goes through all levels.

    Forwards of other threads meet the hooks too, without `kwargs` while torch registers or removes them.
    """

    def __init__(self, cache: Cache, index: int, levels: list[list[int]], parents: list[list[int]]):
        self.cache, self.index, self.levels, self.parents = cache, index, levels, parents
        self.first: Cache | None = None  # what the module is given for the first level
        self.branches: list[LinearAttentionCacheLayerMixin] = []
        """For each level a layer of a cache whose batch are the rows of the level, after their tokens."""

    def enter(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None
    ) -> tuple[tuple, dict[str, Any]] | None:
        """Before the module runs: give it the first level in place of all rows."""
        if kwargs is None or kwargs.get("cache") is not self.cache:
            return None  # one level of this forward, or another's
        rows = args[0] if args else kwargs["hidden_states"]  # (1, R, Ht)
        self.inputs = [rows[0, torch.tensor(level, device=rows.device), None] for level in self.levels]
        given = self._level(0)
        self.first = given["cache"]
        return (), kwargs | {"attention_mask": None} | given  # a row of a tree is no padding

    def leave(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """After it ran: the other levels, and all rows `(1, R, Ht)` in their order."""
        if self.first is None or kwargs.get("cache") is not self.first:
            return None
        self.first = None
        outputs = [output]
        if len(self.inputs) > 1:
            outputs.append(self._later_levels(module, kwargs))
        rows = torch.tensor([row for rows in self.levels for row in rows], device=output.device)
        return torch.cat(outputs)[rows.argsort()].transpose(0, 1)

    def _later_levels(self, module: nn.Module, kwargs: dict[str, Any]) -> torch.Tensor:
        """Outputs of all levels but the first, one behind the other, `(rows, 1, Ht)`."""
        step: Callable[..., torch.Tensor] = module
        projections: dict[str, _Projection] = {}
        own = type(module).forward
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks), bool(_has_any_global_hook())
        if hooks == (1, 1, False):  # others' may change what passes through
            for name, child in module.named_children():
                if hasattr(child, "in_features"):
                    projections[name] = _Projection(child, self.inputs[1:], is_last=_LAST.get(module) == (own, name))
            twin = copy.copy(module)
            vars(twin)["_modules"] = module._modules | projections
            step = twin.forward  # which may still be that of `module`, as accelerate leaves it
        outputs = []
        for level in range(1, len(self.inputs)):
            outputs.append(step(**kwargs | self._level(level)))
            for name, projection in projections.items():
                if projection.output is outputs[-1]:
                    _LAST[module] = own, name
        joined = torch.cat(outputs)
        left_out = [projection for projection in projections.values() if projection.left_out]
        return left_out[0].module(joined) if left_out else joined

    def _level(self, level: int) -> dict[str, Any]:
        """What the module is given for a level of k rows: them, `(k, 1, Ht)`, and the states of their parents."""
        before = self.cache.layers[self.index] if level == 0 else self.branches[-1]
        layer = copy.copy(before)
        parents = self.parents[level]
        layer.conv_states = _select(before.conv_states, parents)
        layer.recurrent_states = _select(before.recurrent_states, parents)
        self.branches.append(layer)
        others = self.cache.layers[: self.index]
        return {"hidden_states": self.inputs[level], "cache": Cache(layers=[*others, layer])}


_LAST: "weakref.WeakKeyDictionary[nn.Module, tuple[Callable, str]]" = weakref.WeakKeyDictionary()
"""Module of a recurrent layer -> its class's `forward`, and the one of its children whose output is its own there."""


class _Projection:
    r"""
    Stands for a projection of a module that goes through several levels, and projects rows of all of them at once.

    Args:
        module (`nn.Module`): The projection.
        levels (`list[torch.FloatTensor]`): What the module that it belongs to is given at each level, `(k, 1, Ht)`.
        is_last (`bool`): Whether its output is that of the whole module. Then it is left out, to be made up for.
    """

    def __init__(self, module: nn.Module, levels: list[torch.Tensor], is_last: bool):
        self.module, self.levels, self.is_last = module, levels, is_last
        self.output: torch.Tensor | None = None
        self.left_out = False
        self._projected: tuple[torch.Tensor, ...] = ()

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        for level, rows in enumerate(self.levels):
            if inputs is rows:
                if not self._projected:
                    self._projected = self.module(torch.cat(self.levels)).split([len(rows) for rows in self.levels])
                return self._projected[level]
        if self.is_last:
            self.left_out = True
            return inputs
        self.output = self.module(inputs)
        return self.output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def _select(states: dict[int, torch.Tensor | None], rows: list[int]) -> dict[int, torch.Tensor | None]:
    return {
        name: None if state is None else state[torch.tensor(rows, device=state.device)]
        for name, state in states.items()
    }
