"""From rows of many lengths to batches: samplers that fill a budget of tokens, and the collator that pads or packs.

Two ways to keep padding low, each with its place:

- `LengthGroupedTokenBatchSampler`, the default: rows of similar length share a batch, one row a sequence. No token
  looks past others, so attention needs no mask but the causal one.
- `PackedTokenBatchSampler` with `ConFuDataCollator(packed_length=...)`: several rows share a sequence, each a document
  of its own. All batches have nearly the same shape, rows of every length meet in each of them, and hardly a token is
  padding. The price is an attention mask.

Both are a pure function of (seed, epoch): a resumed run sets the epoch and skips the batches that it has seen.
"""

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from ..data.dataset import IGNORE_INDEX


# Lengths (in tokens) are rounded up to this step for grouping, so that rows of nearly equal length change places
# between epochs. The price is a batch that may hold one row less than it could.
_LENGTH_STEP = 16


def pack_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bin packing, best fit decreasing: indices of the rows of each bin, whose lengths sum up to at most `capacity`.

    Packing the rows of some of these bins again gives as many bins, filled alike: a row only ever opens a bin where
    no other had room. So a sampler may pack a whole epoch, and the collator each batch of it by the same rule.

    Args:
        lengths: each at most `capacity`.
        capacity: tokens of a bin.

    Raises:
        ValueError: a row is longer than the bin.
    """
    if len(lengths) and max(lengths) > capacity:
        raise ValueError(
            f"A row of {max(lengths)} tokens does not fit a packed sequence of {capacity}: raise the packed length or "
            f"prepare the data with a lower max_length."
        )
    bins: list[list[int]] = []
    spaces: list[int] = []  # that some bin has left, ascending, each once
    bins_with: dict[int, list[int]] = {}
    for row in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        tightest = bisect_left(spaces, lengths[row])
        if tightest == len(spaces):
            number, space = len(bins), capacity
            bins.append([])
        else:
            space = spaces[tightest]
            number = bins_with[space].pop()
            if not bins_with[space]:
                del spaces[tightest], bins_with[space]
        bins[number].append(row)
        if (left := space - int(lengths[row])) > 0:
            if left not in bins_with:
                insort(spaces, left)
            bins_with.setdefault(left, []).append(number)
    return bins


@dataclass
class ConFuDataCollator:
    """Makes one batch of rows: padded on the right, or packed, then padded.

    Args:
        pad_token_id: id that fills `input_ids`; 0 if None. Padding is masked, so any valid id will do.
        packed_length: if given, rows are packed into sequences of at most so many tokens.

    Returns of a call, all LongTensors [B, T]; other columns of the rows are left out, but for `row_ids`, which come as
    a LongTensor of all documents in order:

    - `input_ids`.
    - `attention_mask`: 1 on real tokens, 0 on padding, which is on the right.
    - `labels`: -100 on padding, and on the first token of every row, which nothing foretells. So a run of labels
      never crosses the border of two packed rows.

    and with `packed_length`, where B is the number of sequences and each holds one or more documents, the rows:

    - `document_ids`: number of the token's document within its sequence, from 0 on; -1 on padding.
    - `position_ids`: from 0 on within each document; 0 on padding.

    Token q of a packed sequence may look at token k if `document_ids[q] == document_ids[k]` and `k <= q`. With that
    mask and these positions every document comes out as if it stood alone.
    """

    pad_token_id: int | None = None
    packed_length: int | None = None

    def __post_init__(self) -> None:
        if self.packed_length is not None and self.packed_length < 1:
            raise ValueError(f"packed_length is {self.packed_length}, expected None or at least 1.")

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        lengths = [len(row["input_ids"]) for row in rows]
        for row, length in zip(rows, lengths, strict=True):
            if len(row["labels"]) != length:
                raise ValueError(
                    f"A row has {length} input_ids and {len(row['labels'])} labels, expected as many of both: "
                    f"prepare it with prepare_dataset."
                )
        is_packed = self.packed_length is not None
        sequences = pack_rows(lengths, self.packed_length) if is_packed else [[index] for index in range(len(rows))]
        longest = max(sum(lengths[index] for index in sequence) for sequence in sequences)
        shape = (len(sequences), longest)
        input_ids = torch.full(shape, self.pad_token_id or 0, dtype=torch.long)
        labels = torch.full(shape, IGNORE_INDEX, dtype=torch.long)
        document_ids = torch.full(shape, -1, dtype=torch.long)
        position_ids = torch.zeros(shape, dtype=torch.long)
        for number, sequence in enumerate(sequences):
            first = 0
            for document, index in enumerate(sequence):
                last = first + lengths[index]
                input_ids[number, first:last] = torch.as_tensor(rows[index]["input_ids"])
                labels[number, first + 1 : last] = torch.as_tensor(rows[index]["labels"][1:])
                document_ids[number, first:last] = document
                position_ids[number, first:last] = torch.arange(last - first)
                first = last
        batch = {"input_ids": input_ids, "attention_mask": (document_ids >= 0).long(), "labels": labels}
        if "row_ids" in rows[0]:
            batch["row_ids"] = torch.tensor([rows[index]["row_ids"] for sequence in sequences for index in sequence])
        return batch | {"document_ids": document_ids, "position_ids": position_ids} if is_packed else batch


class TokenBatchSampler(Sampler[list[int]], ABC):
    """What the samplers share: batches within a budget of tokens, the same number of them in every epoch and process.

    With `shuffle`, the order is drawn from (seed, epoch), and the batches of the largest padded size come first, so
    that memory runs out in the first step or not at all.

    On several processes give each its `process_index`: it then gets its own share of the batches. Every row is in one
    batch of one process, and all processes get equally many batches; if the total is not a multiple of their number,
    the batches with most rows are halved until it is. The sampler does by itself what accelerate's `BatchSamplerShard`
    does, which would hide `set_epoch` from a resumed run; so do not let accelerate shard once more:
    `accelerate.data_loader.prepare_data_loader(loader, device=..., num_processes=1, process_index=0,
    put_on_device=True)`.

    Use it as `DataLoader(dataset, batch_sampler=...)`.

    Args:
        lengths: length of every row, in tokens.
        tokens_per_batch: the budget of a batch of one process, in tokens, padding included.
        seed: seed of the shuffling, 0 or more.
        shuffle: whether to shuffle.
        num_processes, process_index: how many processes share the rows, and which of them this is.

    Raises:
        ValueError: a setting is out of range, or there are too few rows for the processes.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        tokens_per_batch: int,
        seed: int = 0,
        shuffle: bool = True,
        num_processes: int = 1,
        process_index: int = 0,
    ) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        if self.lengths.ndim != 1 or self.lengths.size == 0 or self.lengths.min() < 1:
            raise ValueError(f"lengths has shape {self.lengths.shape}, expected a non-empty list of positive lengths.")
        if tokens_per_batch < 1:
            raise ValueError(f"tokens_per_batch is {tokens_per_batch}, expected at least 1.")
        if seed < 0:
            raise ValueError(f"seed is {seed}, expected 0 or more.")
        if not 0 <= process_index < num_processes:
            raise ValueError(f"process_index is {process_index}, expected 0 to {num_processes - 1}.")
        self.tokens_per_batch = tokens_per_batch
        self.seed = seed
        self.shuffle = shuffle
        self.num_processes = num_processes
        self.process_index = process_index
        self.epoch = 0
        self._plan()
        batches = len(self._all_batches(None))
        self._halvings = -batches % num_processes
        if self._halvings > len(self.lengths) - batches:
            raise ValueError(
                f"{len(self.lengths)} rows in {batches} batches cannot be shared evenly by {num_processes} processes: "
                f"give more rows or leave out {len(self.lengths) % num_processes}."
            )
        self._length = (batches + self._halvings) // num_processes

    @abstractmethod
    def _plan(self) -> None:
        """What all epochs have in common."""

    @abstractmethod
    def _all_batches(self, generator: np.random.Generator | None) -> list[np.ndarray]:
        """The batches of an epoch, in order; shuffled if there is a generator, and equally many in every case."""

    @abstractmethod
    def _padded_size(self, batch: np.ndarray) -> int:
        """Tokens of a batch as the collator makes it, padding included."""

    def _epoch(self) -> list[np.ndarray]:
        """The batches of all processes for the current epoch."""
        generator = np.random.default_rng((self.seed, self.epoch)) if self.shuffle else None
        batches = self._all_batches(generator)
        for _ in range(self._halvings):
            index = max(range(len(batches)), key=lambda index: len(batches[index]))
            half = (len(batches[index]) + 1) // 2
            batches[index : index + 1] = [batches[index][:half], batches[index][half:]]
        if self.shuffle:
            sizes = [self._padded_size(batch) for batch in batches]
            largest = sorted(range(len(batches)), key=lambda index: -sizes[index])[: self.num_processes]
            first = set(largest)
            batches = [batches[index] for index in largest] + [
                batch for index, batch in enumerate(batches) if index not in first
            ]
        return batches

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next pass; Trainer calls it before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[list[int]]:
        yield from (batch.tolist() for batch in self._epoch()[self.process_index :: self.num_processes])


class LengthGroupedTokenBatchSampler(TokenBatchSampler):
    """Batches of rows of similar length whose padded size (rows x longest row) stays within a budget of tokens.

    A row longer than the budget is a batch of its own. Lengths are rounded up to a step of 16 tokens before rows are
    batched, and rows change places within a step only. Without `shuffle`, every epoch goes from short rows to long
    ones. Arguments, order and processes: see `TokenBatchSampler`.
    """

    def _plan(self) -> None:
        self._rounded = -(-self.lengths // _LENGTH_STEP) * _LENGTH_STEP
        ascending = np.sort(self._rounded)
        self._bounds: list[tuple[int, int]] = []  # slices [first, last) of rows in ascending order
        last = len(ascending)
        while last > 0:  # filled from the longest row down
            rows = max(1, self.tokens_per_batch // int(ascending[last - 1]))
            self._bounds.append((max(0, last - rows), last))
            last -= rows
        self._bounds.reverse()

    def _all_batches(self, generator: np.random.Generator | None) -> list[np.ndarray]:
        if generator is None:
            order = np.argsort(self.lengths, kind="stable")
            return [order[first:last] for first, last in self._bounds]
        order = np.lexsort((generator.permutation(len(self.lengths)), self._rounded))
        return [order[slice(*self._bounds[index])] for index in generator.permutation(len(self._bounds))]

    def _padded_size(self, batch: np.ndarray) -> int:
        return len(batch) * int(self.lengths[batch].max())


class PackedTokenBatchSampler(TokenBatchSampler):
    """Batches of packed sequences: `tokens_per_batch // packed_length` of them, at least one.

    For `ConFuDataCollator` with the same `packed_length`, which packs each batch into just these sequences. Which
    lengths share a sequence is settled once; which rows of these lengths, and which sequences share a batch, is drawn
    anew for every epoch. Arguments, order and processes: see `TokenBatchSampler`.

    Args:
        packed_length: tokens of a sequence, at least the longest row. By default twice that, within the budget: a row
            of more than half a sequence leaves room for short ones only. Longer sequences pack closer still and make
            attention dearer, whose cost a token grows with them.
    """

    def __init__(
        self, lengths: Sequence[int], tokens_per_batch: int, packed_length: int | None = None, **kwargs: Any
    ) -> None:
        longest = max(lengths, default=0)
        self.packed_length = packed_length or max(longest, min(2 * longest, tokens_per_batch))
        super().__init__(lengths, tokens_per_batch, **kwargs)

    def _plan(self) -> None:
        # Bins of ranks in descending order of length, so that rows of one length may change places.
        self._bins = [np.array(bin) for bin in pack_rows((-np.sort(-self.lengths)).tolist(), self.packed_length)]
        self._bins_per_batch = max(1, self.tokens_per_batch // self.packed_length)

    def _all_batches(self, generator: np.random.Generator | None) -> list[np.ndarray]:
        rows = np.arange(len(self.lengths)) if generator is None else generator.permutation(len(self.lengths))
        order = np.lexsort((rows, -self.lengths))
        bins = np.arange(len(self._bins)) if generator is None else generator.permutation(len(self._bins))
        return [
            np.concatenate([order[self._bins[index]] for index in bins[first : first + self._bins_per_batch]])
            for first in range(0, len(bins), self._bins_per_batch)
        ]

    def _padded_size(self, batch: np.ndarray) -> int:
        lengths = self.lengths[batch].tolist()
        bins = pack_rows(lengths, self.packed_length)
        return len(bins) * max(sum(lengths[index] for index in bin) for bin in bins)
