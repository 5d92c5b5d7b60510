"""Padding and batching against references written out by hand."""

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_sequence

from transformers_confu.training.batch import TokenBatch, TokenBatchSampler, collate


def test_rows_are_padded_on_the_right():
    ids = [torch.arange(1, length + 1) for length in (3, 5, 1)]
    rows = [{"input_ids": x.tolist(), "labels": (x + 10).tolist(), "other": "text"} for x in ids]
    batch = collate(rows)
    for name, tensors, fill in (
        ("input_ids", ids, 0),
        ("labels", [torch.cat([torch.tensor([-100]), x[1:] + 10]) for x in ids], -100),
        ("attention_mask", [torch.ones_like(x) for x in ids], 0),
    ):
        assert batch[name].dtype == torch.long
        assert torch.equal(batch[name], pad_sequence(tensors, batch_first=True, padding_value=fill))
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    # The key of a row is that of its content, whatever it shares a batch with.
    keys = TokenBatch.of(batch).row_keys
    assert len(set(keys)) == 3 and TokenBatch.of(collate(rows[2:])).row_keys == keys[2:]
    assert TokenBatch.of(collate([rows[2] | {"labels": [-100]}])).row_keys == keys[2:]
    other = rows[1] | {"labels": [-100, -100, *rows[1]["labels"][2:]]}
    assert TokenBatch.of(collate([other])).row_keys != keys[1:2]


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=80),
    budget=st.integers(1, 700),
    seed=st.integers(0, 2**32),
    shuffle=st.booleans(),
    num_processes=st.integers(1, 4),
)
def test_batches_keep_the_budget_and_share_all_rows(lengths, budget, seed, shuffle, num_processes):
    def make(process_index):
        return TokenBatchSampler(lengths, budget, seed, shuffle, num_processes, process_index)

    try:
        samplers = [make(process_index) for process_index in range(num_processes)]
    except ValueError:
        assert len(lengths) % num_processes, "what can be shared evenly is"
        return
    for epoch in (0, 1, 7):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        shares = [list(sampler) for sampler in samplers]
        assert shares == [list(sampler) for sampler in samplers]
        assert {len(share) for share in shares} == {len(samplers[0])}
        steps = list(zip(*shares, strict=True))
        batches = [batch for step in steps for batch in step]
        assert all(batches)
        assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
        sizes = [len(batch) * max(lengths[index] for index in batch) for batch in batches]
        assert all(size <= budget or len(batch) == 1 for size, batch in zip(sizes, batches, strict=True))
        if shuffle and num_processes == 1:
            assert sizes[0] == max(sizes)
        if not shuffle:
            of_steps = [[lengths[index] for batch in step for index in batch] for step in steps]
            assert all(max(one) <= min(other) for one, other in pairwise(of_steps))


def test_rows_and_batches_are_shuffled_between_epochs():
    lengths = [10 + index % 90 for index in range(900)]
    sampler, other = (TokenBatchSampler(lengths, 400, seed=seed) for seed in (3, 4))
    first = list(sampler)
    sampler.set_epoch(1)
    later = list(sampler)
    contents = [{frozenset(batch) for batch in batches} for batches in (first, later, list(other))]
    assert len(contents[0] & contents[1]) < 0.1 * len(first) and contents[0] != contents[2]
    padded = sum(len(batch) * max(lengths[index] for index in batch) for batch in first)
    assert sum(lengths) > 0.85 * padded
