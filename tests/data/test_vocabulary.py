"""The draft vocabulary against a reference of plain Python loops."""

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_confu.data.vocabulary import build_draft_vocabulary, count_assistant_tokens


def test_counts_are_those_of_the_labels_and_ids_outside_are_refused():
    # More rows than a chunk.
    dataset = Dataset.from_list([{"input_ids": [1, 2], "labels": [-100, index % 3]} for index in range(2501)])
    counts = count_assistant_tokens(dataset, vocab_size=4)
    assert counts.dtype == torch.long and counts.tolist() == [834, 834, 833, 0]
    with pytest.raises(ValueError, match="span 0 to 2, expected -100 or ids from 0 to 1"):
        count_assistant_tokens(dataset, vocab_size=2)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_vocabulary_equals_the_naive_one(data):
    counts = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=30).filter(any))
    size = data.draw(st.integers(1, len(counts)))
    forced = data.draw(st.lists(st.integers(0, len(counts) - 1), max_size=size))

    chosen = list(dict.fromkeys(forced))
    while len(chosen) < size:
        best = None
        for token, count in enumerate(counts):
            if token not in chosen and (best is None or count > counts[best]):
                best = token
        chosen.append(best)
    chosen.sort()

    given = torch.tensor(counts)
    vocabulary = build_draft_vocabulary(given, size, always_include=iter(forced))
    assert given.tolist() == counts  # as it was
    assert vocabulary.token_ids.tolist() == chosen
    assert vocabulary.token_ids.dtype == torch.long
    assert vocabulary.coverage == pytest.approx(sum(counts[token] for token in chosen) / sum(counts))


@pytest.mark.parametrize(
    ("counts", "size", "forced", "message"),
    [
        ([1, 2], 3, (), "draft_vocab_size is 3, expected 1 to 2"),
        ([1, 2], 0, (), "draft_vocab_size is 0"),
        ([0, 0], 1, (), "no token at all"),
        ([1, 2], 1, (2,), "always_include holds 1 ids, from 2 to 2"),
        ([1, 2], 1, (0, 1), "always_include holds 2 ids, .* expected at most draft_vocab_size = 1"),
    ],
)
def test_building_refuses_bad_input(counts, size, forced, message):
    with pytest.raises(ValueError, match=message):
        build_draft_vocabulary(torch.tensor(counts), size, forced)
