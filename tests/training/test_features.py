"""Kept features against the target itself, in fp64, where a difference is a fault."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from helpers import make_tiny_draft, make_tiny_target
from transformers_confu.data.fingerprints import fingerprint_of_module, fingerprint_of_target
from transformers_confu.inference.target import TargetRunner
from transformers_confu.training.batch import Texts
from transformers_confu.training.batching import ConFuDataCollator
from transformers_confu.training.features import (
    CachedFeatures,
    Field,
    FixedAnchors,
    RowStore,
    draft_head,
)
from transformers_confu.training.objective import Objective, Recipe, compute_live


RECIPE = Recipe(num_steps=3, decay=0.8)


def make_dataset(number: int = 7) -> Dataset:
    """Rows of 8 to 26 tokens: a prompt, an answer, in every third row a second turn."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for row in range(number):
        ids = torch.randint(97, (8 + 3 * row,), generator=generator)
        labels = ids.clone()
        labels[: 3 + row % 2] = -100
        if row % 3 == 2:
            labels[6:8] = -100
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist(), "row_ids": row})
    return Dataset.from_list(rows)


@pytest.fixture(scope="module")
def pair():
    target = make_tiny_target("qwen3").requires_grad_(False)
    draft = make_tiny_draft(target, draft_vocab_size=31)
    draft.set_draft_vocabulary(torch.arange(3, 96, 3))
    return target, draft, TargetRunner(target, draft.config, draft.future_channel)


def assert_same(one: Objective, other: Objective, draft) -> None:
    for name in ("loss_sum", "counted", "correct", "correct_so_far", "accepted_so_far"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-10, atol=1e-10)
    assert (one.rows, one.rows_with_future) == (other.rows, other.rows_with_future)
    parameters = [parameter for parameter in draft.parameters() if parameter.requires_grad]
    ours, theirs = (
        torch.autograd.grad(objective.loss_sum, parameters, allow_unused=True) for objective in (one, other)
    )
    assert sum(gradient is not None for gradient in ours) > 10
    for mine, its in zip(ours, theirs, strict=True):
        if mine is not None:
            torch.testing.assert_close(mine, its, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("packed_length", [None, 60])
def test_kept_features_equal_live_ones(pair, tmp_path, packed_length, monkeypatch):
    target, draft, runner = pair
    dataset = make_dataset()
    features = CachedFeatures(draft, runner, dataset, tmp_path)
    collate = ConFuDataCollator(packed_length=packed_length)
    batches = [collate([dataset[row] for row in rows]) for rows in ([4, 1, 6], [0, 2], [5, 3, 1])]
    for batch in batches:
        texts = Texts.of(batch)
        kept = features.compute(texts, batch["row_ids"].tolist(), RECIPE)
        assert_same(kept, compute_live(draft, runner, texts, None, RECIPE), draft)

    # Once every row was seen, nobody asks the target, nor does a later run with the same data.
    monkeypatch.setattr(type(target), "forward", None)
    again = CachedFeatures(draft, runner, dataset, tmp_path)
    for batch in batches:
        rows = batch["row_ids"].tolist()
        first, second = (cache.compute(Texts.of(batch), rows, RECIPE) for cache in (features, again))
        torch.testing.assert_close(first.loss_sum, second.loss_sum, rtol=0, atol=0)


def test_kept_future_predictions_equal_live_ones(pair, tmp_path, monkeypatch):
    target, draft, runner = pair
    draft.future_channel.soft_prompts.requires_grad_(False)
    draft.future_channel.contemplate_token.requires_grad_(False)
    dataset = make_dataset()
    anchors = FixedAnchors(replication=2, max_lag=3, limit=None, seed=5)
    features = CachedFeatures(draft, runner, dataset, tmp_path, anchors)
    batch = ConFuDataCollator()([dataset[row] for row in (6, 2, 0)])
    texts = Texts.of(batch)
    drawn = features._anchors(texts, [6, 2, 0])
    live = compute_live(draft, runner, texts, drawn, RECIPE)
    assert live.rows_with_future > 10
    assert_same(features.compute(texts, [6, 2, 0], RECIPE), live, draft)
    monkeypatch.setattr(type(target), "forward", None)
    other_order = ConFuDataCollator()([dataset[row] for row in (0, 6)])
    features.compute(Texts.of(other_order), [0, 6], RECIPE)


def test_kept_features_equal_live_ones_in_mixed_precision(tmp_path):
    """Autocast is for the draft: the target's scores stay as precise as the target."""
    target = make_tiny_target("qwen3", dtype=torch.float32).requires_grad_(False)
    draft = make_tiny_draft(target)
    runner, dataset = TargetRunner(target, draft.config, draft.future_channel), make_dataset()
    features = CachedFeatures(draft, runner, dataset, tmp_path)
    texts = Texts.of(ConFuDataCollator()([dataset[row] for row in range(7)]))
    with torch.autocast("cpu", torch.bfloat16):
        kept, live = features.compute(texts, list(range(7)), RECIPE), compute_live(draft, runner, texts, None, RECIPE)
    torch.testing.assert_close(kept.loss_sum, live.loss_sum, rtol=1e-5, atol=0)


def test_a_folder_of_other_data_target_or_channel_is_refused(pair, tmp_path):
    target, draft, runner = pair
    anchors = FixedAnchors(replication=2, max_lag=3, limit=None, seed=5)
    CachedFeatures(draft, runner, make_dataset(), tmp_path, anchors)
    with pytest.raises(ValueError, match="features made with another dataset"):
        CachedFeatures(draft, runner, make_dataset(6), tmp_path, anchors)
    other = make_tiny_draft(target, draft_vocab_size=31)
    with torch.no_grad():
        other.future_channel.soft_prompts.add_(1)
    with pytest.raises(ValueError, match="features made with another channel"):
        CachedFeatures(
            other, TargetRunner(target, other.config, other.future_channel), make_dataset(), tmp_path, anchors
        )
    rotated = make_tiny_draft(target, draft_vocab_size=31, rotate_soft_prompts=True)
    with pytest.raises(ValueError, match="features made with another rotate_soft_prompts"):
        runner_of_it = TargetRunner(target, rotated.config, rotated.future_channel)
        CachedFeatures(rotated, runner_of_it, make_dataset(), tmp_path, anchors)
    for name, value in (("rms_norm_eps", 1e-3), ("num_contemplate_experts_per_token", 1)):
        changed = make_tiny_draft(target, draft_vocab_size=31, **{name: value})
        with pytest.raises(ValueError, match=f"features made with another {name}"):
            runner_of_it = TargetRunner(target, changed.config, changed.future_channel)
            CachedFeatures(changed, runner_of_it, make_dataset(), tmp_path, anchors)
    changed = make_tiny_target("qwen3")
    with torch.no_grad():
        changed.lm_head.weight.mul_(1.5)
    others = [changed, make_tiny_target("qwen3", rms_norm_eps=1e-3)]
    others.append(make_tiny_target("qwen3", rope_parameters={"rope_type": "default", "rope_theta": 500.0}))
    for changed in others:
        with pytest.raises(ValueError, match="features made with another target"):
            CachedFeatures(draft, TargetRunner(changed, draft.config, draft.future_channel), make_dataset(), tmp_path)


def test_the_fingerprint_of_a_target_is_of_what_its_checkpoint_holds():
    target, again = make_tiny_target("qwen3"), make_tiny_target("qwen3")
    again.config._name_or_path = "elsewhere"
    plain = fingerprint_of_target(target)
    assert fingerprint_of_target(again) == plain
    # As quantised weights are kept; what a forward makes for itself is no part of a checkpoint.
    again.lm_head.register_buffer("cache", torch.zeros(3), persistent=False)
    assert fingerprint_of_target(again) == plain
    for packed in (0, 2**30, 2**30 + 1):
        again.lm_head.register_buffer("packed", torch.full((3,), packed, dtype=torch.int32))
        seen = fingerprint_of_target(again)
        assert seen != plain
        plain = seen


def test_the_fingerprint_looks_at_all_columns_of_a_large_weight():
    module = torch.nn.Linear(256, 4096)  # a sample of every 256th value would be its first column
    before = fingerprint_of_module(module)
    with torch.no_grad():
        module.weight[:, 1:].mul_(2)
    assert fingerprint_of_module(module) != before


def free_space(monkeypatch, size: int) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=size))


def test_too_small_a_disk_is_refused_before_any_work(tmp_path, monkeypatch):
    free_space(monkeypatch, 10)
    with pytest.raises(ValueError, match=r"take 0\.0 GB, and .* has 0\.0 GB left"):
        RowStore(tmp_path, {}, {"a": Field([3], (2,), torch.float32)})
    assert not list(tmp_path.iterdir())


def test_the_disk_must_hold_what_all_files_still_take(tmp_path, monkeypatch):
    size, fields = 2**20, {"a": Field([1] * 4, (2**16,), torch.float32)}
    free_space(monkeypatch, 7 * size // 4)
    first = RowStore(tmp_path / "first", {}, fields)
    assert first.unwritten == size
    with pytest.raises(ValueError, match="not yet written take"):
        RowStore(tmp_path / "second", {}, fields, promised=first.unwritten)
    for row in range(2):
        first.write(row, {"a": torch.rand(1, 2**16)})
    assert first.unwritten == size // 2
    RowStore(tmp_path / "second", {}, fields, promised=first.unwritten)
    # Where it goes on, what is written already takes no room.
    free_space(monkeypatch, 3 * size // 4)
    RowStore(tmp_path / "first", {}, fields)
    free_space(monkeypatch, size // 4)
    with pytest.raises(ValueError, match="not yet written take"):
        RowStore(tmp_path / "first", {}, fields)


def test_target_and_future_predictions_share_the_disk(pair, tmp_path, monkeypatch):
    target, draft, runner = pair
    anchors = FixedAnchors(replication=2, max_lag=3, limit=None, seed=5)
    whole = CachedFeatures(draft, runner, make_dataset(), tmp_path / "whole", anchors)
    free_space(monkeypatch, whole.store.unwritten + whole.futures.unwritten - 1)
    with pytest.raises(ValueError, match="not yet written take"):
        CachedFeatures(draft, runner, make_dataset(), tmp_path / "other", anchors)


def test_scores_that_are_capped_behind_the_head_are_refused(tmp_path):
    target = make_tiny_target("qwen3").requires_grad_(False)
    draft = make_tiny_draft(target)
    target.lm_head.register_forward_hook(lambda module, args, output: output * 3 if output.shape[0] > 40 else output)
    dataset = make_dataset()
    features = CachedFeatures(draft, TargetRunner(target, draft.config, draft.future_channel), dataset, tmp_path)
    batch = ConFuDataCollator()([dataset[row] for row in range(7)])
    with pytest.raises(ValueError, match="no linear map of its final hidden state"):
        features.compute(Texts.of(batch), list(range(7)), RECIPE)


def test_the_head_of_the_draft_vocabulary_scores_as_the_whole_one(pair):
    target, draft, _ = pair
    states = torch.randn(5, target.config.hidden_size, dtype=torch.float64)
    expected = target.lm_head(states)[:, draft.draft_token_ids]
    torch.testing.assert_close(draft_head(target, draft.draft_token_ids)(states), expected)
