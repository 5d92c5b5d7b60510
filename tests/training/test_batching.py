"""Padding, packing and batching against references written out by hand, and packed forwards against single ones."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packing import may_see, packed_and_single_batches
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from helpers import make_tiny_target
from transformers_confu.training.batching import (
    ConFuDataCollator,
    LengthGroupedTokenBatchSampler,
    PackedTokenBatchSampler,
    pack_rows,
)


SAMPLERS = pytest.mark.parametrize("sampler_class", [LengthGroupedTokenBatchSampler, PackedTokenBatchSampler])


@pytest.mark.parametrize("pad_token_id", [None, 9])
def test_collator_pads_on_the_right(pad_token_id):
    ids = [torch.arange(1, length + 1) for length in (3, 5, 1)]
    rows = [{"input_ids": x.tolist(), "labels": (x + 10).tolist(), "other": "text"} for x in ids]
    batch = ConFuDataCollator(pad_token_id)(rows)

    for name, tensors, fill in (
        ("input_ids", ids, pad_token_id or 0),
        ("labels", [torch.cat([torch.tensor([-100]), x[1:] + 10]) for x in ids], -100),
        ("attention_mask", [torch.ones_like(x) for x in ids], 0),
    ):
        expected = pad_sequence(tensors, batch_first=True, padding_value=fill)
        assert batch[name].dtype == torch.long
        assert torch.equal(batch[name], expected)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_collator_packs():
    rows = [{"input_ids": [10 * n + i for i in range(n)], "labels": [10 * n + i for i in range(n)]} for n in (2, 5, 3)]
    batch = ConFuDataCollator(pad_token_id=1, packed_length=7)(rows)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[50, 51, 52, 53, 54, 20, 21], [30, 31, 32, 1, 1, 1, 1]],
        "labels": [[-100, 51, 52, 53, 54, -100, 21], [-100, 31, 32, -100, -100, -100, -100]],
        "attention_mask": [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]],
        "document_ids": [[0, 0, 0, 0, 0, 1, 1], [0, 0, 0, -1, -1, -1, -1]],
        "position_ids": [[0, 1, 2, 3, 4, 0, 1], [0, 1, 2, 0, 0, 0, 0]],
    }
    assert all(tensor.dtype == torch.long for tensor in batch.values())


def test_packed_documents_come_out_as_if_alone():
    target = make_tiny_target()
    packed, singles = packed_and_single_batches(target.config.vocab_size)
    blocked = torch.zeros(1, dtype=target.dtype).masked_fill(
        ~may_see(packed["document_ids"])[:, None], torch.finfo(target.dtype).min
    )
    logits = target(packed["input_ids"], attention_mask=blocked, position_ids=packed["position_ids"]).logits
    for single, sequence, span in singles:
        alone = target(single["input_ids"]).logits[0]
        torch.testing.assert_close(logits[sequence, span], alone, rtol=1e-12, atol=1e-12)
        assert torch.equal(packed["labels"][sequence, span], single["labels"][0])


def test_collator_refuses_bad_input():
    with pytest.raises(ValueError, match="2 input_ids and 1 labels"):
        ConFuDataCollator()([{"input_ids": [1, 2], "labels": [1]}])
    with pytest.raises(ValueError, match="packed_length is 0"):
        ConFuDataCollator(packed_length=0)
    with pytest.raises(ValueError, match="row of 3 tokens does not fit a packed sequence of 2"):
        ConFuDataCollator(packed_length=2)([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}])


@settings(max_examples=150, deadline=None)
@given(data=st.data(), lengths=st.lists(st.integers(1, 40), max_size=60), capacity=st.integers(40, 90))
def test_packing_is_best_fit_decreasing_and_repeats_on_a_part(data, lengths, capacity):
    bins = pack_rows(lengths, capacity)
    fills = []  # by the plain rule: into the fullest bin with room
    for length in sorted(lengths, reverse=True):
        room = [index for index, fill in enumerate(fills) if fill + length <= capacity]
        if room:
            fills[max(room, key=lambda index: fills[index])] += length
        else:
            fills.append(length)
    assert sorted(row for bin in bins for row in bin) == list(range(len(lengths)))
    assert sorted(sum(lengths[row] for row in bin) for bin in bins) == sorted(fills)

    part = data.draw(st.lists(st.sampled_from(range(len(bins))), unique=True)) if bins else []
    rows = data.draw(st.permutations([row for index in part for row in bins[index]]))
    again = pack_rows([lengths[row] for row in rows], capacity)
    assert sorted(sum(lengths[rows[row]] for row in bin) for bin in again) == sorted(
        sum(lengths[row] for row in bins[index]) for index in part
    )


@SAMPLERS
@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=80),
    budget=st.integers(1, 700),
    seed=st.integers(0, 2**32),
    shuffle=st.booleans(),
    num_processes=st.integers(1, 4),
)
def test_sampler_properties(sampler_class, lengths, budget, seed, shuffle, num_processes):
    def make(process_index, num_processes=num_processes):
        return sampler_class(
            lengths, budget, seed=seed, shuffle=shuffle, num_processes=num_processes, process_index=process_index
        )

    plain_batches = len(make(0, num_processes=1))
    if -plain_batches % num_processes > len(lengths) - plain_batches:
        with pytest.raises(ValueError, match="cannot be shared evenly"):
            make(0)
        return
    samplers = [make(process_index) for process_index in range(num_processes)]
    for epoch in (0, 1, 7):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        shares = [list(sampler) for sampler in samplers]
        assert shares == [list(sampler) for sampler in samplers]
        assert {len(share) for share in shares} == {len(samplers[0])}
        assert len(samplers[0]) == math.ceil(plain_batches / num_processes)
        batches = [batch for step in zip(*shares, strict=True) for batch in step]
        assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))

        collated = collate(batches, lengths, samplers[0])
        sizes = [mask.numel() for mask in collated]
        assert all(size <= budget or len(mask) == 1 for size, mask in zip(sizes, collated, strict=True))
        if shuffle:
            assert sizes[:num_processes] == sorted(sizes, reverse=True)[:num_processes]
        elif sampler_class is LengthGroupedTokenBatchSampler:
            flat = [lengths[index] for batch in batches for index in batch]
            assert all(first <= second for first, second in pairwise(flat))


def collate(batches, lengths, sampler):
    """The attention masks of batches."""
    collator = ConFuDataCollator(packed_length=getattr(sampler, "packed_length", None))
    rows = [{"input_ids": [1] * length, "labels": [1] * length} for length in lengths]
    return [collator([rows[index] for index in batch])["attention_mask"] for batch in batches]


def padding_share(sampler, lengths):
    return 1 - sum(lengths) / sum(mask.numel() for mask in collate(sampler, lengths, sampler))


@SAMPLERS
def test_sampler_shuffles_rows_and_batches_between_epochs(sampler_class):
    lengths = [10 + index % 90 for index in range(900)]
    sampler = sampler_class(lengths, 400, seed=3)
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    contents = [{frozenset(batch) for batch in batches} for batches in epochs]
    assert len(contents[0] & contents[1]) < 0.1 * len(contents[0])
    assert epochs[0] != epochs[1] != epochs[2]
    assert list(sampler_class(lengths, 400, seed=4)) != epochs[0]
    sampler.set_epoch(0)
    assert list(sampler) == epochs[0]
    assert padding_share(sampler, lengths) < 0.15
    assert len(epochs[0]) < 1.3 * math.ceil(sum(lengths) / 400)


def test_packing_leaves_less_padding_than_grouping():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.empty(2000).log_normal_(5.3, 0.7, generator=generator).long().clamp(20, 512).tolist()
    grouped = LengthGroupedTokenBatchSampler(lengths, 2048)
    packed = PackedTokenBatchSampler(lengths, 2048)
    assert padding_share(packed, lengths) < 0.02 < padding_share(grouped, lengths)


@SAMPLERS
@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([], 10), {}, "expected a non-empty list"),
        (([1, 0], 10), {}, "positive lengths"),
        (([1], 0), {}, "tokens_per_batch is 0"),
        (([1], 1), {"seed": -1}, "seed is -1"),
        (([1], 1), {"process_index": 1}, "process_index is 1, expected 0 to 0"),
        (([9, 9, 9], 9), {"num_processes": 2}, "3 rows in 3 batches cannot be shared evenly by 2 processes.* out 1"),
    ],
)
def test_sampler_refuses_bad_settings(sampler_class, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        sampler_class(*arguments, **options)


def test_packed_sampler_refuses_rows_that_do_not_fit():
    with pytest.raises(ValueError, match="row of 9 tokens does not fit a packed sequence of 8"):
        PackedTokenBatchSampler([3, 9], 16, packed_length=8)


def test_rows_reach_a_data_loader():
    rows = [{"input_ids": [1] * length, "labels": [1] * length} for length in (3, 30, 4, 31, 5)]
    lengths = [len(row["input_ids"]) for row in rows]
    grouped = DataLoader(
        rows, batch_sampler=LengthGroupedTokenBatchSampler(lengths, 64), collate_fn=ConFuDataCollator()
    )
    assert sorted(tuple(batch["input_ids"].shape) for batch in grouped) == [(2, 31), (3, 5)]
    packed = DataLoader(
        rows,
        batch_sampler=PackedTokenBatchSampler(lengths, 80, packed_length=40),
        collate_fn=ConFuDataCollator(packed_length=40),
    )
    assert [tuple(batch["input_ids"].shape) for batch in packed] == [(2, 40)]
