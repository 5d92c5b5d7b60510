"""What this branch tries, against one row at a time in fp64; the reference shares only the draft's own modules."""

import copy

import pytest
import torch
from test_objective import (
    DECAY,
    STEPS,
    anchors_of,
    assert_same,
    make_batch,
    make_pair,
    make_text,
    mixed_batch,
    naive_objective,
    naive_rows,
)
from torch import nn
from transformers import DynamicCache

from helpers import make_tiny_draft, make_tiny_target, rotate
from transformers_confu.inference.modeling_confu import FutureToken
from transformers_confu.inference.target import TargetRunner
from transformers_confu.training.batch import TokenBatch
from transformers_confu.training.initialisation import factor_head
from transformers_confu.training.objective import Recipe, compute_live
from transformers_confu.training.replay import rounds


FORMS = {
    "paper": {},
    "read-out": {"future_readout": True, "use_future_residual": False},
    "read-out, norms": {"future_readout": True, "use_future_residual": False, "norm_output": True, "fc_norm": True},
    "ordered": {"num_contemplate_rows": 3},
    "ordered, rotated, adapters": {
        "num_contemplate_rows": 2,
        "rotate_soft_prompts": True,
        "contemplate_adapter_rank": 2,
    },
    "low-rank head": {"head_rank": 3},
}


def pair(name: str):
    target, draft = make_pair("llama", **FORMS[name])
    if draft.config.contemplate_adapter_rank:
        nn.init.normal_(draft.future_channel.contemplate_adapter_up)
    return target, draft


def objective(target, draft, batch, anchors, **recipe):
    runner = TargetRunner(target, draft.config, draft.future_channel)
    return compute_live(draft, runner, TokenBatch.of(vars(batch)), anchors, Recipe(STEPS, DECAY, **recipe))


def naive_futures(target, draft, ids, anchor: int, router: int, taps) -> torch.Tensor:
    """Ordered contemplate rows behind the text up to `anchor`, as rows of a plain forward; `(rows, F)`."""
    config, channel = draft.config, draft.future_channel
    cache = DynamicCache()
    target(ids[:, : anchor + 1], cache=cache, use_cache=True)
    for layer, (keys, values) in enumerate(channel.soft_prompts):
        if config.rotate_soft_prompts:
            keys = rotate(keys, router + 1)
        cache.layers[layer].keys = torch.cat([cache.layers[layer].keys, keys[None]], dim=2)
        cache.layers[layer].values = torch.cat([cache.layers[layer].values, values[None]], dim=2)
    rows = channel.contemplate_token(taps[router]).view(config.num_contemplate_rows, -1)
    seen = anchor + 1 + config.num_soft_prompts
    length = len(rows)
    sees = torch.cat([torch.ones(length, seen), torch.ones(length, length).tril()], dim=1).bool()
    handles = []
    if config.contemplate_adapter_rank:
        for layer, down, up in zip(
            target.model.layers, channel.contemplate_adapter_down, channel.contemplate_adapter_up, strict=True
        ):
            handles.append(
                layer.mlp.register_forward_hook(
                    lambda module, args, out, down=down, up=up: out + nn.functional.silu(args[0] @ down.T) @ up.T
                )
            )
    states = target(
        inputs_embeds=rows[None],
        position_ids=torch.arange(anchor + 1, anchor + 1 + length)[None],
        attention_mask=torch.zeros(1, 1, *sees.shape, dtype=torch.float64).masked_fill(~sees, float("-inf")),
        cache=cache,
        output_hidden_states=True,
    ).hidden_states
    for handle in handles:
        handle.remove()
    return torch.cat([states[index] for index in config.future_hidden_state_indices], dim=-1)[0]


def naive_step(draft, cache, embeds, features, position: int, future, taps_feature, anchor: int, step: int):
    """One draft row behind a cache, to which it is added: output of the layer."""
    layer, channel, config = draft.layers[0], draft.future_channel, draft.config

    def attend(inputs_embeds, features, position, cache):
        inputs = layer.attention_input(inputs_embeds, features)
        places = draft.rotary_emb(inputs, torch.tensor([[position]]))
        return layer.self_attn(inputs, position_embeddings=places, cache=cache, num_queries=1)

    if future is None:
        return layer.finish(features, attend(embeds, features, position, cache), None)
    embedding = channel.future_token(taps_feature)
    if config.future_readout:
        attend(embeds, features, position, cache)
        projected = channel.future_projection(future[0])[None, None]
        return layer.finish(projected, attend(embedding, projected, position + 1, copy.deepcopy(cache)), None)
    with_slots = copy.deepcopy(cache)
    several = len(future) > 1
    for nth, state in enumerate(future):
        place = anchor + 1 + nth if several else position + 1
        attend(embedding, channel.future_projection(state)[None, None], place, with_slots)
    matching = position - anchor if several else 0  # of the row that stood behind this one's place
    residual = torch.zeros_like(features)
    if matching < len(future):
        residual = channel.future_residual(future[matching])[None, None]
    output = layer.finish(features, attend(embeds, features, position, with_slots), FutureToken(None, None, residual))
    attend(embeds, features, position, cache)
    return output


def naive_loss(target, draft, text, anchors, roots=None, foresight: float = 0.0):
    """Of one text; of `roots`, running on the draft's own guesses, if given."""
    ids, labels = text.input_ids, text.labels[0].tolist()
    plain = target(ids, output_hidden_states=True)
    taps = torch.cat([plain.hidden_states[index] for index in draft.config.target_hidden_state_indices], dim=-1)[0]
    embed, tokens = target.get_input_embeddings(), draft.draft_token_ids
    loss = torch.zeros((), dtype=torch.float64)
    refused = []

    def divergence(target_logits, logits):
        log_p, log_q = target_logits[tokens].log_softmax(-1), logits.log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum()

    if foresight:
        for index, anchor in enumerate(anchors.positions[0].tolist()):
            futures = naive_futures(target, draft, ids, anchor, int(anchors.routed_by[0, index]), taps)
            for nth, state in enumerate(futures):
                if anchor + 2 + nth >= len(labels) or labels[anchor + 2 + nth] == -100:
                    break
                said = target.lm_head(state[-draft.config.target_hidden_size :])[tokens]
                loss = loss + foresight * divergence(plain.logits[0, anchor + 1 + nth], said)
    next_root = -1
    for row in naive_rows(text.labels[0]) if roots is None else roots:
        features, future, anchor = draft.fuse_taps(taps[None, : row + 1]), None, None
        fused = features[:, -1:]
        if anchors is not None and (index := int(anchors.of_row[0, row])) >= 0:
            anchor = int(anchors.positions[0, index])
            future = naive_futures(target, draft, ids, anchor, int(anchors.routed_by[0, index]), taps)
        cache = DynamicCache(config=draft.config)
        if row > 0:
            draft(embed(ids[:, 1 : row + 1]), features[:, :-1], torch.arange(row)[None], cache=cache, num_queries=1)
        features, read, accepted, was_refused = features[:, -1:], ids[:, : row + 2], 0, False
        for step in range(STEPS):
            predicted = row + 2 + step
            if roots is None and (predicted >= len(labels) or labels[predicted] == -100):
                break
            output = naive_step(draft, cache, embed(read[:, -1:]), features, row + step, future, fused, anchor, step)
            features = draft.next_features(output)
            logits = draft.lm_head(draft.head_down(draft.norm(output)))[0, 0]
            loss = loss + DECAY**step * divergence(target(read).logits[0, -1], logits)
            guess = tokens[logits.argmax()].view(1, 1)
            if roots is None:
                said = ids[:, predicted, None]
                was_refused |= accepted == step and bool(guess != said)
                accepted += int(accepted == step and bool(guess == said))
            read = torch.cat([read, guess if roots is not None else said], dim=1)
        if roots is None and row >= next_root:
            next_root = row + accepted + 1
            refused += [row] if was_refused else []
    return loss, refused


@torch.no_grad()
@pytest.mark.parametrize("name", FORMS)
def test_the_loss_is_the_naive_one(name):
    target, draft = pair(name)
    text = make_text((3, 6), (2, 5), seed=1)
    for anchors in (anchors_of(text, replication=0), anchors_of(text, replication=2, max_lag=2)):
        got = objective(target, draft, text, anchors)
        expected, _ = naive_loss(target, draft, text, anchors)
        torch.testing.assert_close(got.loss_sum, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("name", ["read-out", "read-out, norms"])
def test_decoding_reads_out_as_training_does(name):
    """`naive_objective` asks the draft's own forward, as decoding does."""
    target, draft = pair(name)
    text = make_text((3, 6), (2, 5), seed=1)
    anchors = anchors_of(text, replication=0, max_lag=1)
    assert_same(objective(target, draft, text, anchors), naive_objective(target, draft, text, anchors))


@pytest.mark.parametrize("name", ["paper", "ordered", "ordered, rotated, adapters"])
def test_foresight_is_the_divergence_of_the_rows_own_predictions(name):
    target, draft = pair(name)
    text = make_text((3, 6), (2, 5), seed=1)
    anchors = anchors_of(text, replication=1, max_lag=2)
    got = objective(target, draft, text, anchors, foresight=0.3)
    with torch.no_grad():
        expected, _ = naive_loss(target, draft, text, anchors, foresight=0.3)
    torch.testing.assert_close(got.loss_sum.detach(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FORMS)
def test_padding_changes_nothing_and_gradients_reach_all(name):
    target, draft = pair(name)
    batch = mixed_batch()
    anchors = anchors_of(batch)
    got = objective(target, draft, batch, anchors, foresight=0.1)
    got.loss_sum.backward()
    for parameter, value in draft.named_parameters():
        assert value.grad is not None and value.grad.isfinite().all() and value.grad.any(), parameter
    again = make_batch(batch, padding=7)
    padded = objective(target, draft, again, anchors_of(again), foresight=0.1)
    torch.testing.assert_close(got.loss_sum, padded.loss_sum, rtol=1e-9, atol=1e-9)
    assert all(p.grad is None for p in target.parameters())
    assert not any(layer.mlp._forward_hooks for layer in target.model.layers)


def test_replayed_rows_follow_the_draft_s_own_guesses():
    target, draft = make_pair()
    texts = [make_text((3, 16), seed=1), make_text((2, 5), (1, 8), seed=2)]
    for text in texts:  # of the draft's own tokens, so that guesses hold now and then
        text.input_ids.copy_(draft.draft_token_ids[text.input_ids % 5])
        text.labels.copy_(text.input_ids.where(text.labels != -100, -100))
    batch = make_batch(*texts)
    got = objective(target, draft, batch, None, on_policy="guesses", replayed=1000)
    expected = torch.zeros((), dtype=torch.float64)
    number = 0
    with torch.no_grad():
        for index, text in enumerate(texts):
            loss, refused = naive_loss(target, draft, text, None)
            assert got.refused[index].nonzero()[:, 0].tolist() == refused
            expected += loss + naive_loss(target, draft, text, None, roots=refused)[0]
            number += len(refused)
    assert 3 < number < sum(len(naive_rows(text.labels[0])) for text in texts)
    torch.testing.assert_close(got.loss_sum.detach(), expected, rtol=1e-9, atol=1e-9)


def test_rounds_start_where_the_one_before_ended():
    right = torch.tensor([[1, 1, 0, 0, 1, 1, 0], [1, 0, 1, 1, 1, 0, 1]]).bool()[:, None]
    rows = torch.tensor([[3, 4, 5, 6, 7, 20, 21]])
    is_root, accepted = rounds(rows, torch.ones(1, 7, dtype=torch.bool), right)
    assert accepted.tolist() == [[2, 1, 0, 0, 2, 1, 0]]
    assert rows[is_root].tolist() == [3, 6, 7, 20]


def test_a_head_of_full_rank_is_the_target_s_and_a_lower_one_the_weighted_least_squares():
    target = make_tiny_target()
    counts = torch.arange(97) ** 2
    draft = make_tiny_draft(target, head_rank=32)
    factor_head(draft, target, counts)
    torch.testing.assert_close(draft.lm_head.weight @ draft.head_down.weight, target.lm_head.weight)
    draft = make_tiny_draft(target, head_rank=5)
    factor_head(draft, target, counts)
    weighted = (counts + 1.0).sqrt()[:, None] * target.lm_head.weight
    u, s, v = torch.linalg.svd(weighted, full_matrices=False)
    expected = u[:, :5] * s[:5] @ v[:5] / (counts + 1.0).sqrt()[:, None]
    torch.testing.assert_close(draft.lm_head.weight @ draft.head_down.weight, expected)
