"""The draft vocabulary: the target tokens a draft can propose, chosen by how often the target's answers hold them."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset

from .encoding import IGNORE_INDEX


@dataclass(frozen=True)
class DraftVocabulary:
    """A subset of Vd of the target's V tokens."""

    token_ids: torch.LongTensor  # (Vd,), ascending; entry i is the target id of draft id i
    coverage: float  # share (0..1) of the counted tokens that the vocabulary holds


def count_assistant_tokens(dataset: Dataset, vocab_size: int) -> torch.LongTensor:
    """How often each of the target's V tokens occurs among the labels of a prepared dataset, LongTensor [V]."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for batch in dataset.select_columns("labels").with_format("arrow").iter(batch_size=1000):
        labels = pc.list_flatten(batch["labels"]).to_numpy()
        labels = labels[labels != IGNORE_INDEX]
        if labels.size and not 0 <= labels.min() <= labels.max() < vocab_size:
            raise ValueError(
                f"The labels span {labels.min()} to {labels.max()}, expected {IGNORE_INDEX} or ids from 0 to "
                f"{vocab_size - 1}: prepare the data with the target's tokenizer."
            )
        counts += np.bincount(labels, minlength=vocab_size)
    return torch.from_numpy(counts)


def build_draft_vocabulary(
    counts: torch.LongTensor, draft_vocab_size: int, always_include: Iterable[int] = ()
) -> DraftVocabulary:
    """
    The `draft_vocab_size` most frequent tokens; of equally frequent ones those with the lower id.

    Args:
        counts: LongTensor [V], occurrences of each target token.
        always_include: target ids to include whatever their count. Pass every id that ends an answer: a draft that
            cannot propose them loses the last round of each answer.
    """
    vocab_size, total, forced = counts.numel(), int(counts.sum()), sorted(set(always_include))
    if not 1 <= draft_vocab_size <= vocab_size:
        raise ValueError(
            f"draft_vocab_size is {draft_vocab_size}, expected 1 to {vocab_size}, the target's vocabulary size."
        )
    if total == 0:
        raise ValueError("counts holds no token at all, expected occurrences of assistant tokens.")
    if len(forced) > draft_vocab_size or (forced and not 0 <= forced[0] <= forced[-1] < vocab_size):
        raise ValueError(
            f"always_include holds {len(forced)} ids, from {forced[0]} to {forced[-1]}; expected at most "
            f"draft_vocab_size = {draft_vocab_size}, from 0 to {vocab_size - 1}."
        )
    rank = counts.clone()
    rank[forced] = counts.max() + 1
    # Stable: of equal counts the lower id stays first, on every device and version.
    token_ids = torch.sort(rank, descending=True, stable=True).indices[:draft_vocab_size].sort().values
    return DraftVocabulary(token_ids, coverage=int(counts[token_ids].sum()) / total)
