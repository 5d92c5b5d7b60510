"""A batch of training texts, padded or packed, as the objectives read it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from .anchors import draft_rows


@dataclass
class Texts:
    r"""
    Args:
        input_ids, attention_mask, labels (`torch.LongTensor` of shape `(batch, length)`): Right-padded; labels are
            -100 outside of answers.
        position_ids (`torch.LongTensor` of shape `(batch, length)`): From 0 on in each document.
        document_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): Number of each token's document, -1
            on padding, where a sequence packs several; see [`ConFuDataCollator`].
    """

    input_ids: torch.LongTensor
    attention_mask: torch.LongTensor
    labels: torch.LongTensor
    position_ids: torch.LongTensor
    document_ids: torch.LongTensor | None = None

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> "Texts":
        """Of a batch as the collator makes it."""
        input_ids = batch["input_ids"]
        positions = batch.get("position_ids")
        if positions is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        return cls(input_ids, batch["attention_mask"], batch["labels"], positions, batch.get("document_ids"))

    @cached_property
    def draft_rows(self) -> torch.BoolTensor:
        """See [`~anchors.draft_rows`], `(B, T)`."""
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
        """What rows standing at `columns` `(B, R)` see of the text, `(B, R, T)`: their document up to themselves."""
        index = torch.arange(self.input_ids.shape[1], device=columns.device)
        sees = (index <= columns[..., None]) & self.attention_mask.bool()[:, None]
        if self.document_ids is not None:
            sees &= self.document_ids[:, None] == self.document_ids.gather(1, columns)[..., None]
        return sees

    def documents(self) -> Iterator[tuple[int, int, int]]:
        """`(sequence, first, behind the last)` of every document, in the collator's order."""
        numbers = self.attention_mask - 1 if self.document_ids is None else self.document_ids
        for sequence, of_token in enumerate(numbers.tolist()):
            first = 0
            while first < len(of_token) and of_token[first] >= 0:
                last = first
                while last < len(of_token) and of_token[last] == of_token[first]:
                    last += 1
                yield sequence, first, last
                first = last
