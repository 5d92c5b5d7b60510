"""Kept features against the target itself, in fp64, where a difference is a fault."""

import pytest
import torch
from datasets import Dataset

from helpers import make_family, make_tiny_draft, make_tiny_target
from transformers_confu.data.fingerprints import fingerprint_of_module, fingerprint_of_target
from transformers_confu.inference.target import TargetRunner
from transformers_confu.training import features as kept_features
from transformers_confu.training import teacher
from transformers_confu.training.anchors import Anchors, AnchorSampling
from transformers_confu.training.batch import TokenBatch, collate
from transformers_confu.training.features import KeptFeatures
from transformers_confu.training.objective import Objective, compute_objective
from transformers_confu.training.teacher import Teaching, teach


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
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return Dataset.from_list(rows)


@pytest.fixture(scope="module")
def pair():
    target = make_tiny_target("qwen3").requires_grad_(False)
    draft = make_tiny_draft(target, draft_vocab_size=31)
    draft.set_draft_vocabulary(torch.arange(3, 96, 3))
    return target, draft, TargetRunner(target, draft.config, draft.future_channel)


def objective_of(teaching: Teaching, runner: TargetRunner, draft, batch: TokenBatch, anchors=None) -> Objective:
    return compute_objective(draft, runner.embed, batch, teaching, anchors, num_steps=3, decay=0.8)


def assert_kept_is_live(features: KeptFeatures, batch: TokenBatch, anchors: Anchors | None = None) -> Objective:
    """By loss, counts and gradients; returns the live objective."""
    draft, runner = features.draft, features.runner
    one, other = (
        objective_of(teaching, runner, draft, batch, anchors)
        for teaching in (features.teach(batch, anchors), teach(draft, runner, batch, anchors))
    )
    torch.testing.assert_close(one.loss_sum, other.loss_sum, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(one.counts, other.counts, rtol=1e-10, atol=1e-10)
    parameters = [parameter for parameter in draft.parameters() if parameter.requires_grad]
    ours, theirs = (
        torch.autograd.grad(objective.loss_sum, parameters, allow_unused=True) for objective in (one, other)
    )
    assert sum(gradient is not None for gradient in ours) > 10
    for mine, its in zip(ours, theirs, strict=True):
        if mine is not None:
            torch.testing.assert_close(mine, its, rtol=1e-8, atol=1e-10)
    return other


SAMPLING = AnchorSampling(replication=2, max_lag=3, seed=5)


def make_batch(*rows: int) -> TokenBatch:
    """Of rows 0 to 6; all of them if none is named."""
    dataset = make_dataset()
    return TokenBatch.of(collate([dataset[row] for row in rows or range(7)]))


def anchors_of(batch: TokenBatch) -> Anchors:
    return SAMPLING.draw(batch.labels, batch.row_keys)


@pytest.mark.parametrize("sampling", [None, SAMPLING], ids=["core", "futures"])
def test_kept_features_equal_live_ones(pair, tmp_path, monkeypatch, sampling):
    target, draft, runner = pair
    draft.future_channel.soft_prompts.requires_grad_(sampling is None)
    draft.future_channel.contemplate_token.requires_grad_(sampling is None)
    features = KeptFeatures(draft, runner, tmp_path, sampling)
    texts_read: list[int] = []

    def read_batch(runner: TargetRunner, batch: TokenBatch, **how):
        texts_read.append(len(batch.input_ids))
        return teacher.read_batch(runner, batch, **how)

    monkeypatch.setattr(kept_features, "read_batch", read_batch)
    for rows in ((4, 1, 6), (0, 2), (5, 3, 1)):
        batch = make_batch(*rows)
        live = assert_kept_is_live(features, batch, sampling and anchors_of(batch))
        assert live.counts["rows_with_future"] > 5 or sampling is None
    # Each row was asked for once, alone where the others of its batch had been.
    assert texts_read == [3, 2, 2]
    # Once every row was seen, nobody asks the target, nor does a later run.
    monkeypatch.setattr(type(target), "forward", None)
    batch = make_batch(6, 4, 2)
    anchors = sampling and anchors_of(batch)
    one, other = (
        objective_of(kept.teach(batch, anchors), runner, draft, batch, anchors).loss_sum
        for kept in (features, KeptFeatures(draft, runner, tmp_path, sampling))
    )
    assert one == other


def test_kept_features_equal_live_ones_in_mixed_precision(tmp_path):
    """Autocast is for the draft: the target's scores stay as precise as the target."""
    target = make_tiny_target("qwen3", dtype=torch.float32).requires_grad_(False)
    draft = make_tiny_draft(target)
    runner = TargetRunner(target, draft.config, draft.future_channel)
    features, batch = KeptFeatures(draft, runner, tmp_path), make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        kept = objective_of(features.teach(batch, None), runner, draft, batch)
        live = objective_of(teach(draft, runner, batch, None), runner, draft, batch)
    torch.testing.assert_close(kept.loss_sum, live.loss_sum, rtol=1e-5, atol=0)


def test_a_folder_of_another_target_or_channel_is_refused(pair, tmp_path):
    target, draft, runner = pair
    KeptFeatures(draft, runner, tmp_path, SAMPLING)
    moved, rescaled = make_tiny_draft(target, draft_vocab_size=31), make_tiny_target("qwen3")
    with torch.no_grad():
        moved.future_channel.soft_prompts.add_(1)
        rescaled.lm_head.weight.mul_(1.5)
    options = {"rotate_soft_prompts": True, "rms_norm_eps": 1e-3, "num_contemplate_experts_per_token": 1}
    theta = {"rope_type": "default", "rope_theta": 500.0}
    for other_target, other_draft, what in (
        (target, moved, "channel"),
        *((target, make_tiny_draft(target, draft_vocab_size=31, **{name: options[name]}), name) for name in options),
        (rescaled, draft, "target"),
        (make_tiny_target("qwen3", rms_norm_eps=1e-3), draft, "target"),
        (make_tiny_target("qwen3", rope_parameters=theta), draft, "target"),
    ):
        runner = TargetRunner(other_target, other_draft.config, other_draft.future_channel)
        with pytest.raises(ValueError, match=rf"features made with something else \(.*{what} was .*, is "):
            KeptFeatures(other_draft, runner, tmp_path, SAMPLING)


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


SCALED = {
    "Granite": {"logits_scaling": 1.04},
    "Cohere": {"logit_scale": 0.25},
    "Gemma2": {"final_logit_softcapping": 3.0, "layer_types": ["full_attention"] * 5},
}


@pytest.mark.parametrize("family", SCALED)
def test_scores_that_are_scaled_or_capped_behind_the_head_are_kept_as_they_are(family, tmp_path):
    target = make_family(family, tie_word_embeddings=True, **SCALED[family]).requires_grad_(False)
    draft = make_tiny_draft(target, draft_vocab_size=31)
    runner = TargetRunner(target, draft.config, draft.future_channel)
    assert_kept_is_live(KeptFeatures(draft, runner, tmp_path), make_batch())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_scores_that_follow_in_no_known_way_are_refused(dtype, tmp_path):
    target = make_tiny_target("qwen3", dtype=dtype).requires_grad_(False)
    draft = make_tiny_draft(target, dtype=torch.float32)
    runner = TargetRunner(target, draft.config, draft.future_channel)
    batch = make_batch()
    KeptFeatures(draft, runner, tmp_path / "plain").teach(batch, None)

    def scale_last_row(module, args, output):
        if output.shape[:-1].numel() == int(batch.teaching_positions.sum()):  # not when its rows are read off
            output = output.clone()
            output[-1] *= 1.05
        return output

    target.lm_head.register_forward_hook(scale_last_row)
    features = KeptFeatures(draft, runner, tmp_path / "scaled")
    with pytest.raises(ValueError, match="The scores of Qwen3ForCausalLM do not follow from its final hidden state"):
        features.teach(batch, None)
