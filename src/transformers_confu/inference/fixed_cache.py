"""A cache whose buffers keep their shape and their place, so that rounds can be compiled.

Each layer is one buffer: `capacity` rows for the text, then a scratch for the rows of a round. A forward writes its
rows into the scratch and reads the whole buffer; which rows of the text there are, the mask says. Afterwards the rows
that are now text are copied behind it. So nothing that a forward takes has a shape that follows the text.
"""

import dataclasses
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from transformers import CompileConfig, DynamicCache, PreTrainedConfig, StaticCache
from transformers.cache_utils import DynamicLayer


class FixedLayer(DynamicLayer):
    r"""
    A layer of a [`DynamicCache`] in a buffer of `capacity` rows for the text and `new_rows` for those of a round.

    Args:
        layer (`DynamicLayer`): An initialised layer without a window, whose rows are copied.
        capacity (`int`), new_rows (`int`): Rows of the buffer.
    """

    is_compileable = True

    def __init__(self, layer: DynamicLayer, capacity: int, new_rows: int):
        super().__init__()
        self.device, self.is_initialized = layer.device, True
        self.capacity, self.used = capacity, 0
        buffers = []
        for states in (layer.keys, layer.values):
            buffer = states.new_zeros(*states.shape[:-2], capacity + new_rows, states.shape[-1])
            buffer[..., : states.shape[-2], :] = states
            torch._dynamo.mark_static_address(buffer)  # else a CUDA graph would have to copy it in and out
            buffers.append(buffer)
        self.keys, self.values = buffers

    def get_seq_length(self) -> int:
        """Rows that a mask has columns for: all of the text's part, and those of this round so far."""
        return self.capacity + self.used

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        first = self.get_seq_length()
        end = first + key_states.shape[-2]
        places = torch.arange(first, end, device=self.device)
        self.keys.index_copy_(-2, places, key_states)
        self.values.index_copy_(-2, places, value_states)
        self.used = end - self.capacity
        return self.keys[..., :end, :], self.values[..., :end, :]

    def keep(self, first: torch.LongTensor, rows: torch.LongTensor) -> None:
        """Copy `rows` of the scratch to the rows of the text from `first` `(1,)` on, and empty the scratch."""
        places = first.to(self.device) + torch.arange(rows.shape[0], device=self.device)
        for buffer in (self.keys, self.values):
            buffer.index_copy_(-2, places, buffer.index_select(-2, self.capacity + rows.to(self.device)))
        self.used = 0


class FixedRoom:
    r"""
    Gives `cache` layers of fixed shape for the time of a `with`, and afterwards ordinary ones with the rows of then.

    Args:
        cache ([`DynamicCache`]): With initialised layers.
        capacity (`int`): Rows for the text, and for `most_kept` more.
        most_kept (`int`): Rows of a round that become text at most; as many are always copied.
        new_rows (`int`): Rows of a round.
        compiled: Compiles a function, or gives it back as it is.
    """

    def __init__(
        self,
        cache: DynamicCache,
        capacity: int,
        most_kept: int,
        new_rows: int,
        compiled: Callable[[Callable], Callable],
    ):
        self.cache, self.capacity, self.most_kept, self.new_rows = cache, capacity, most_kept, new_rows
        self._keep_rows = compiled(keep_rows)

    def __enter__(self) -> "FixedRoom":
        self.length = self.cache.get_seq_length()
        self.cache.layers = [FixedLayer(layer, self.capacity, self.new_rows) for layer in self.cache.layers]
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        layers = self.cache.layers
        self.cache.layers = [DynamicLayer() for _ in layers]
        for index, layer in enumerate(layers):
            self.cache.update(layer.keys[..., : self.length, :], layer.values[..., : self.length, :], index)

    def padded(self, visible: torch.BoolTensor) -> torch.BoolTensor:
        """Rows of the text that are no padding `(1, length)`, among all that there is room for `(1, capacity)`."""
        return torch.nn.functional.pad(visible, (0, self.capacity - visible.shape[1]))

    def seen(self, lengths: torch.LongTensor) -> torch.BoolTensor:
        """
        Of all rows that may become text `(1, columns)`, those that are: so many of the text's part, and so many of the
        round's, `lengths` `(2,)`.
        """
        text = torch.arange(self.capacity, device=lengths.device) < lengths[0]
        return torch.cat([text, torch.arange(self.most_kept, device=lengths.device) < lengths[1]])[None]

    def keep(self, rows: list[int]) -> None:
        """Let these rows of the round be the next of the text; drop all others."""
        device = self.cache.layers[0].device
        padded = torch.tensor(rows + rows[-1:] * (self.most_kept - len(rows)), device=device)
        self._keep_rows(self.cache, torch.full((1,), self.length, device=device), padded)
        self.length += len(rows)

    def drop(self) -> None:
        """Let no row of the round be text, and copy none: what has overflowed would spoil even rows that see none."""
        for layer in self.cache.layers:
            layer.used = 0


def keep_rows(cache: DynamicCache, first: torch.LongTensor, rows: torch.LongTensor) -> None:
    """
    Let rows of a round be the next of the text, from `first` on, and drop all others. Rows too many, given to keep the
    shape, lie behind the text, where nothing sees them and the next ones go.
    """
    for layer in cache.layers:
        layer.keep(first, rows)


def not_compiled(function: Callable) -> Callable:
    """`function` as it is."""
    return function


def compiled_by(config: CompileConfig) -> Callable[[Callable], Callable]:
    """Makes compiled functions, whose results are copied: a CUDA graph overwrites its own when it runs again."""

    def compiled(function: Callable) -> Callable:
        run = torch.compile(function, **config.to_dict())
        return lambda *args, **kwargs: _copied(run(*args, **kwargs))

    return compiled


def _copied(result: Any) -> Any:
    if isinstance(result, torch.Tensor):
        return result.clone()
    if isinstance(result, tuple):
        return tuple(map(_copied, result))
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        return dataclasses.replace(
            result, **{field.name: _copied(getattr(result, field.name)) for field in dataclasses.fields(result)}
        )
    return result


def rows_of(cache: StaticCache, config: PreTrainedConfig) -> DynamicCache:
    """A dynamic cache for a target of this configuration, with what a static one holds and carries."""
    rows = DynamicCache(config=config)
    length = int(cache.get_seq_length())
    if length > 0:
        for index, layer in enumerate(cache.layers):
            rows.update(layer.keys[..., :length, :], layer.values[..., :length, :], index)
    for name in ("confu_state", "_is_user_defined"):
        if name in vars(cache):
            setattr(rows, name, getattr(cache, name))
    return rows


def hand_back(rows: DynamicCache, cache: StaticCache) -> None:
    """Give a static cache the rows that [`rows_of`] it has got since, and the state that they carry."""
    length = int(cache.get_seq_length())
    for layer in cache.layers:
        if length > 0 and layer.keys.is_inference() and not torch.is_inference_mode_enabled():
            # What was made in inference mode, by an earlier turn, cannot be written to outside of it.
            for name in ("keys", "values", "cumulative_length"):
                setattr(layer, name, getattr(layer, name).clone())
    for index, layer in enumerate(rows.layers):
        cache.update(layer.keys[..., length:, :], layer.values[..., length:, :], index)
    cache.confu_state = rows.confu_state
