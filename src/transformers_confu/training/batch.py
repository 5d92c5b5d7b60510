"""From rows of a dataset to a batch: which rows share one, how they are padded, and how the objectives read them."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import Sampler

from ..data.dataset import IGNORE_INDEX


# Lengths are rounded up to a multiple of this many tokens before rows are sorted by them, so that rows of nearly equal
# length change places between epochs.
_LENGTH_STEP = 16

PerText = TypeVar("PerText", bound=Any)  # a dataclass of tensors, `(B, ...)` each


class TokenBatchSampler(Sampler[list[int]]):
    """
    Batches of rows of similar length whose padded size (rows x longest row) stays within a budget of tokens.

    Rows of one length need little padding and no attention mask but the causal one. (Packing several texts into one
    sequence needs a mask of its own for every sequence; a forward of a 135M target over the same texts then took 1.4
    times as long on a CPU.) A row longer than the budget is a batch of its own.

    The batches are a function of (seed, epoch) alone: a resumed run sets the epoch and skips the batches that it has
    had. The largest batches come first, so that memory runs out in the first step or not at all. Without `shuffle`,
    every epoch goes from short rows to long ones.

    Several processes share the rows of each step: every row is in one batch of one process, and all have equally many
    batches. So the data loader must not be sharded once more by accelerate.

    Args:
        lengths: Of every row, in tokens; at least 1 each.
        tokens_per_batch: The budget of a batch of one process, in tokens, padding included.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        tokens_per_batch: int,
        seed: int = 0,
        shuffle: bool = True,
        num_processes: int = 1,
        process_index: int = 0,
    ):
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.seed, self.shuffle = seed, shuffle
        self.num_processes, self.process_index = num_processes, process_index
        self.epoch = 0
        self._rounded = -(-self.lengths // _LENGTH_STEP) * _LENGTH_STEP
        ascending = np.sort(self._rounded)
        self._steps: list[tuple[int, int]] = []  # of each step: slice [first, last) of the rows by ascending length
        last = len(ascending)
        while last > 0:  # filled from the longest row down
            first = max(0, last - num_processes * max(1, tokens_per_batch // int(ascending[last - 1])))
            self._steps.insert(0, (first, last))
            last = first
        if self._steps and self._steps[0][1] < num_processes:  # the shortest rows, and too few: take some more
            if len(self._steps) == 1 or self._steps[1][1] < 2 * num_processes:
                raise ValueError(
                    f"{len(lengths)} rows of these lengths cannot be shared evenly by {num_processes} processes: give "
                    f"more rows or leave out {len(lengths) % num_processes}."
                )
            self._steps[:2] = [(0, num_processes), (num_processes, self._steps[1][1])]

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next pass; Trainer calls it before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[list[int]]:
        order, steps = np.argsort(self.lengths, kind="stable"), self._steps
        if self.shuffle:
            generator = np.random.default_rng((self.seed, self.epoch))
            order = np.lexsort((generator.permutation(len(self.lengths)), self._rounded))
            shuffled = [self._steps[number] for number in generator.permutation(len(self._steps))]
            largest = max(shuffled, key=lambda step: (step[1] - step[0]) * self.lengths[order[slice(*step)]].max())
            steps = sorted(shuffled, key=lambda step: step != largest)
        for first, last in steps:
            yield order[first:last][self.process_index :: self.num_processes].tolist()


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """
    One batch of the rows of a prepared dataset, padded on the right with zeros, which no row that counts sees:
    `input_ids`, `attention_mask` and `labels`, LongTensors `(B, T)`. Labels are -100 on padding and on every first
    token, which nothing foretells.
    """
    shape = (len(rows), max(len(row["input_ids"]) for row in rows))
    input_ids, attention_mask = torch.zeros(2, *shape, dtype=torch.long)
    labels = torch.full(shape, IGNORE_INDEX, dtype=torch.long)
    for number, row in enumerate(rows):
        length = len(row["input_ids"])
        input_ids[number, :length] = torch.as_tensor(row["input_ids"])
        attention_mask[number, :length] = 1
        labels[number, 1:length] = torch.as_tensor(row["labels"][1:])
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


@dataclass
class TokenBatch:
    """A batch as the objectives read it, `(B, T)` each: padded on the right, labels -100 outside of answers."""

    input_ids: torch.LongTensor
    attention_mask: torch.LongTensor
    labels: torch.LongTensor

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> "TokenBatch":
        """Of a batch as the collator makes it."""
        return cls(batch["input_ids"], batch["attention_mask"], batch["labels"])

    @cached_property
    def position_ids(self) -> torch.LongTensor:
        """`(B, T)`"""
        return torch.arange(self.input_ids.shape[1], device=self.input_ids.device).expand_as(self.input_ids)

    @cached_property
    def row_keys(self) -> list[int]:
        """See [`row_key`]."""
        lengths = self.attention_mask.sum(dim=1).tolist()
        rows = zip(self.input_ids.cpu().numpy(), self.labels.cpu().numpy(), lengths, strict=True)
        return [row_key(ids[:length], labels[:length]) for ids, labels, length in rows]

    @cached_property
    def draft_rows(self) -> torch.BoolTensor:
        """See [`draft_rows`], `(B, T)`."""
        return draft_rows(self.labels)

    @cached_property
    def teaching_positions(self) -> torch.BoolTensor:
        """Where the target teaches a draft row, `(B, T)`: behind each of them (and so behind every later TTT step)."""
        return self.draft_rows.roll(1, dims=1)  # a text's last token is no draft row

    @cached_property
    def teacher_numbers(self) -> torch.LongTensor:
        """Numbers of the teaching positions through the batch, row by row, and -1 elsewhere; `(B, T)`."""
        is_teacher = self.teaching_positions
        return (is_teacher.flatten().cumsum(0).view_as(self.labels) - 1).masked_fill(~is_teacher, -1)

    def sees(self, columns: torch.LongTensor) -> torch.BoolTensor:
        """What rows standing at `columns` `(B, R)` see of the text, `(B, R, T)`: everything up to themselves."""
        index = torch.arange(self.input_ids.shape[1], device=columns.device)
        return (index <= columns[..., None]) & self.attention_mask.bool()[:, None]


def texts_of(of_texts: PerText, numbers: list[int]) -> PerText:
    """Some texts of a [`TokenBatch`], or of the [`~anchors.Anchors`] of one."""
    return type(of_texts)(*(getattr(of_texts, field.name)[numbers] for field in fields(of_texts)))


def row_key(input_ids: np.ndarray, labels: np.ndarray) -> int:
    """A number of 64 bits that follows from what a row holds, as the collator reads it."""
    content = np.stack([input_ids, labels]).astype(np.int64)
    content[1, 0] = IGNORE_INDEX
    return int.from_bytes(hashlib.sha256(content.tobytes()).digest()[:8])


def draft_rows(labels: torch.LongTensor) -> torch.BoolTensor:
    r"""
    The rows that decoding can start a tree from, `(B, T)`, of labels `(B, T)`.

    Row i holds the feature at i and token i + 1, and predicts token i + 2; both tokens must be answer tokens. The
    first row of an answer is its last prompt token.
    """
    is_answer = labels != IGNORE_INDEX
    rows = torch.zeros_like(is_answer)
    rows[:, :-2] = is_answer[:, 1:-1] & is_answer[:, 2:]
    return rows


def gather_rows(states: torch.Tensor, index: torch.LongTensor) -> torch.Tensor:
    """Rows `index` `(B, R)` of `states` `(B, T, D)`."""
    return states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))
