"""The loss of one batch against a naive one: a contemplate row behind every token, loops over rows and steps.

All in fp64, where a difference is a fault. The reference shares only the draft's and the channel's own modules with
the training code: no cache of the text, no batch of anchors, no unrolling, no padding.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from helpers import make_tiny_draft, make_tiny_target, rotate
from transformers_confu import ConFuDraftModel
from transformers_confu.inference.draft_tree import DraftTree
from transformers_confu.inference.growing_cache import let_grow
from transformers_confu.inference.target import TargetRunner
from transformers_confu.training.anchors import Anchors, AnchorSampling
from transformers_confu.training.batch import TokenBatch, draft_rows
from transformers_confu.training.objective import Objective, compute_objective
from transformers_confu.training.teacher import teach


STEPS, DECAY = 4, 0.7

PAIRS = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {}),
    "windows": ("windows", {}),
    "own width and embeddings": ("llama", {"hidden_size": 24, "num_key_value_heads": 1, "head_dim": 10}),
    "five taps, f of two states": (
        "llama",
        {"target_hidden_state_indices": [0, 1, 2, 3, 5], "future_hidden_state_indices": [2, 5]},
    ),
    "no soft prompts": ("llama", {"num_soft_prompts": 0}),
    "rotated soft prompts": ("qwen3", {"rotate_soft_prompts": True}),
    "single experts": ("llama", {"num_contemplate_experts_per_token": 1, "num_future_experts_per_token": 1}),
    "no residual, biases": ("llama", {"use_future_residual": False, "attention_bias": True}),
    "norms of EAGLE-3.1": ("llama", {"fc_norm": True, "norm_output": True, "use_qk_norm": True}),
    "norms of speculators": ("llama", {"norm_before_fc": True, "norm_before_residual": True}),
}


def make_pair(name: str = "llama", **more) -> tuple[PreTrainedModel, ConFuDraftModel]:
    """Target and draft in fp64.

    The target mostly likes 4 tokens, 3 of them among the 5 that the draft predicts, so that the draft is right now and
    then by chance.
    """
    kind, overrides = PAIRS[name]
    target = make_tiny_target(kind).requires_grad_(False)
    target.lm_head.weight[[13, 40, 71, 90]] *= 4
    draft = make_tiny_draft(target, **({"draft_vocab_size": 5} | overrides | more))
    draft.set_draft_vocabulary(torch.tensor([71, 13, 5, 40, 22]))
    if draft.config.attention_bias:  # starts at zero
        for projection in (draft.layers[0].self_attn.q_proj, draft.layers[0].self_attn.k_proj):
            nn.init.normal_(projection.bias, generator=torch.Generator().manual_seed(3))
    return target, draft


@dataclass
class Batch:
    input_ids: torch.LongTensor
    attention_mask: torch.LongTensor
    labels: torch.LongTensor

    def __len__(self) -> int:
        return len(self.input_ids)

    def text(self, number: int) -> "Batch":
        """One text without its padding."""
        real = self.attention_mask[number].bool()
        return Batch(*(part[number, real][None] for part in vars(self).values()))


def make_text(*turns: tuple[int, int], seed: int = 0) -> Batch:
    """A text of random tokens, from turns of (prompt tokens, answer tokens)."""
    is_answer = torch.tensor([[flag for prompt, answer in turns for flag in [False] * prompt + [True] * answer]])
    ids = torch.randint(97, is_answer.shape, generator=torch.Generator().manual_seed(seed))
    return Batch(ids, torch.ones_like(ids), ids.masked_fill(~is_answer, -100))


def make_batch(*texts: Batch, padding: int = 0) -> Batch:
    length = max(text.input_ids.shape[1] for text in texts) + padding

    def padded(part: str, value: int) -> torch.LongTensor:
        rows = [getattr(text, part) for text in texts]
        return torch.cat([nn.functional.pad(row, (0, length - row.shape[1]), value=value) for row in rows])

    return Batch(padded("input_ids", 11), padded("attention_mask", 0), padded("labels", -100))


def mixed_batch() -> Batch:
    """Several turns, answers of 1 and 2 tokens, answers up to the end, a text without any."""
    return make_batch(
        make_text((3, 45), seed=1),
        make_text((2, 6), (1, 8), (3, 2), seed=2),
        make_text((4, 1), (2, 2), (5, 0), seed=3),
        make_text((6, 0), seed=4),
    )


def objective_of(target, draft, batch: Batch, anchors: Anchors | None, steps: int = STEPS) -> Objective:
    runner = TargetRunner(target, draft.config, draft.future_channel)
    batch = TokenBatch.of(vars(batch))
    teaching = teach(draft, runner, batch, anchors)
    return compute_objective(draft, runner.embed, batch, teaching, anchors, steps, DECAY)


def anchors_of(batch: Batch, replication: int = 3, max_lag: int = 4, seed: int = 0) -> Anchors:
    return AnchorSampling(replication, max_lag, seed).draw(batch.labels, range(len(batch)))


# The reference

LOADS = ("contemplate_load", "future_load")


@dataclass
class NaiveTarget:
    taps: torch.Tensor  # (T, taps_size)
    logits: torch.Tensor  # (T, V)
    futures: torch.Tensor | None  # (T, future_size): of the contemplate row behind each token


def additive(sees: torch.BoolTensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(1, 1, *sees.shape, dtype=dtype).masked_fill(~sees, float("-inf"))


def run_naive_target(
    target: PreTrainedModel, draft: ConFuDraftModel, input_ids: torch.LongTensor, routed_by: torch.LongTensor | None
) -> NaiveTarget:
    """One forward over [T tokens | a contemplate row behind each]; `routed_by` `(T,)` is the token that routes it."""
    config, channel = draft.config, draft.future_channel
    length, slots = input_ids.shape[1], config.num_soft_prompts
    plain = target(input_ids, output_hidden_states=True)
    taps = torch.cat([plain.hidden_states[index] for index in config.target_hidden_state_indices], dim=-1)
    if routed_by is None:
        return NaiveTarget(taps[0], plain.logits[0], None)

    token = torch.arange(length)
    sees = torch.zeros(2 * length, slots + 2 * length, dtype=torch.bool)
    for i in range(length):
        sees[i, slots : slots + i + 1] = True
        sees[length + i, : slots + i + 1] = True
        sees[length + i, slots + length + i] = True
    masks = {"full_attention": additive(sees, target.dtype)}
    if (window := getattr(target.config, "sliding_window", None)) is not None:
        for i in range(length):
            sees[i, slots : slots + max(i + 1 - window, 0)] = False
            sees[length + i, slots : slots + max(i + 2 - window, 0)] = False
        masks["sliding_attention"] = additive(sees, target.dtype)

    def futures_of_all(root: int | None) -> torch.Tensor:
        # The slots are the only past; where a key stands in memory means nothing to attention.
        past = DynamicCache()
        for layer, (keys, values) in enumerate(channel.soft_prompts):
            past.update((keys if root is None else rotate(keys, root))[None], values[None], layer)
        outputs = target(
            inputs_embeds=torch.cat(
                [target.get_input_embeddings()(input_ids), channel.contemplate_token(taps[0, routed_by])[None]], dim=1
            ),
            position_ids=torch.cat([token, token + 1])[None],
            attention_mask=masks if len(masks) > 1 else masks["full_attention"],
            cache=past,
            output_hidden_states=True,
        )
        torch.testing.assert_close(outputs.logits[:, :length], plain.logits, rtol=1e-10, atol=1e-10)
        futures = torch.cat([outputs.hidden_states[index] for index in config.future_hidden_state_indices], dim=-1)
        return futures[0, length:]

    if config.rotate_soft_prompts:  # a forward for every row, since slots have one position in a forward
        futures = torch.stack([futures_of_all(router + 1)[row] for row, router in enumerate(routed_by.tolist())])
    else:
        futures = futures_of_all(None)
    return NaiveTarget(taps[0], plain.logits[0], futures)


def naive_rows(labels: torch.LongTensor) -> list[int]:
    labels = labels.tolist()
    return [i for i in range(len(labels) - 2) if labels[i + 1] != -100 and labels[i + 2] != -100]


def naive_objective(target, draft: ConFuDraftModel, text: Batch, anchors: Anchors | None, steps: int = STEPS) -> dict:
    """The objective of one unpadded text, whose anchors are row 0 of `anchors`."""
    (input_ids, labels), length = (text.input_ids, text.labels[0]), text.input_ids.shape[1]
    routed_by = None
    if anchors is not None:
        routed_by = torch.arange(length)
        routed_by[anchors.positions[0]] = anchors.routed_by[0]
    seen = run_naive_target(target, draft, input_ids, routed_by)
    embeds = (draft.embed_tokens or target.get_input_embeddings())(input_ids)
    draft_tokens = draft.draft_token_ids.tolist()

    result = {"loss_sum": torch.zeros((), dtype=draft.dtype), "rows": 0, "rows_with_future": 0}
    result |= {name: [0] * steps for name in ("counted", "correct", "correct_so_far", "accepted_so_far")}
    if anchors is not None:
        mixtures = draft.future_channel.contemplate_token, draft.future_channel.future_token
        result |= {name: [0] * len(mixture.experts) for name, mixture in zip(LOADS, mixtures, strict=True)}
        for routed in anchors.routed_by[0].tolist():
            for expert in chosen_experts(mixtures[0], seen.taps[routed]):
                result["contemplate_load"][expert] += 1
    for row in naive_rows(labels):
        result["rows"] += 1
        features, future = draft.fuse_taps(seen.taps[None, : row + 1]), None
        if anchors is not None and (index := int(anchors.of_row[0, row])) >= 0:
            result["rows_with_future"] += 1
            future_state = seen.futures[anchors.positions[0, index]]
            future = draft.future(future_state[None, None], features[:, -1:])
            for expert in chosen_experts(mixtures[1], features[0, -1]):
                result["future_load"][expert] += 1
        cache = DynamicCache(config=draft.config)
        next_embeds, positions = embeds[:, 1 : row + 2], torch.arange(row + 1)[None]
        right_so_far, accepted_so_far = True, 1.0
        for step in range(steps):
            predicted = row + 2 + step
            if predicted >= length or labels[predicted] == -100:
                break
            output = draft(next_embeds, features, positions, cache=cache, future=future, num_queries=1)
            features, next_embeds = output.features, embeds[:, predicted, None]
            positions = positions[:, -1:] + 1

            target_logits = seen.logits[predicted - 1]
            p_of_all = target_logits.softmax(dim=-1)[draft_tokens]
            p = p_of_all / p_of_all.sum()
            log_q = output.logits[0, 0].log_softmax(dim=-1)
            divergence = sum(p[k] * (p[k].log() - log_q[k]) for k in range(len(draft_tokens)))
            result["loss_sum"] = result["loss_sum"] + DECAY**step * divergence
            is_right = draft_tokens[int(log_q.argmax())] == int(target_logits.argmax())
            right_so_far &= is_right
            accepted_so_far *= float(torch.minimum(p_of_all, log_q.exp()).sum())
            result["counted"][step] += 1
            result["correct"][step] += is_right
            result["correct_so_far"][step] += right_so_far
            result["accepted_so_far"][step] += accepted_so_far
    return result


def chosen_experts(mixture: nn.Module, state: torch.Tensor) -> list[int]:
    return mixture.router(mixture.norm(state)).topk(mixture.num_experts_per_token).indices.tolist()


def assert_same(objective: Objective, expected: dict) -> None:
    torch.testing.assert_close(objective.loss_sum, expected["loss_sum"], rtol=1e-10, atol=1e-10)
    counts = {name: value.tolist() for name, value in objective.counts.items()}
    assert counts.pop("loss") == objective.loss_sum
    assert counts.pop("accepted_so_far") == pytest.approx(expected["accepted_so_far"], rel=1e-9)
    for name, value in counts.items():
        assert value == expected.get(name, [0] * 8), name


def total(results: list[dict]) -> dict:
    summed = dict(results[0])
    for result in results[1:]:
        for name, value in result.items():
            summed[name] = (
                [a + b for a, b in zip(summed[name], value, strict=True)]
                if isinstance(value, list)
                else summed[name] + value
            )
    return summed


def row_of(anchors: Anchors, number: int) -> Anchors:
    """The anchors of one text of a batch, without padding."""
    count = int(anchors.of_row[number].max()) + 1
    return Anchors(
        anchors.positions[number, None, :count],
        anchors.exists[number, None, :count],
        anchors.routed_by[number, None, :count],
        anchors.of_row[number, None],
    )


# Loss and counts


@torch.no_grad()
@pytest.mark.parametrize("name", PAIRS)
def test_with_every_row_an_anchor_the_loss_is_the_naive_one(name):
    target, draft = make_pair(name)
    text = make_text((3, 7), (2, 5), seed=1)
    anchors = anchors_of(text, replication=0, max_lag=1)
    assert anchors.of_row[0, draft_rows(text.labels)[0]].tolist() == list(range(anchors.positions.shape[1]))
    expected = naive_objective(target, draft, text, anchors)
    assert expected["rows"] == expected["rows_with_future"]
    assert_same(objective_of(target, draft, text, anchors), expected)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["anchors", "eagle3"])
@pytest.mark.parametrize("name", ["llama", "own width and embeddings"])
def test_a_padded_batch_is_the_sum_of_its_texts(name, mode):
    target, draft = make_pair(name)
    batch = mixed_batch()
    anchors = anchors_of(batch) if mode == "anchors" else None
    expected = total(
        [
            naive_objective(target, draft, batch.text(number), anchors and row_of(anchors, number))
            for number in range(len(batch))
        ]
    )
    # The numbers are such that each would notice a fault.
    assert expected["counted"][0] > expected["counted"][-1] > 0
    assert expected["correct"][2] > expected["correct_so_far"][2] > 0
    if anchors is not None:
        assert 0 < expected["rows_with_future"] < expected["rows"]
    assert_same(objective_of(target, draft, batch, anchors), expected)


@torch.no_grad()
def test_a_target_that_computes_all_logits_gives_the_same_loss(monkeypatch):
    target, draft = make_pair()
    batch = mixed_batch()
    anchors = anchors_of(batch)
    expected = objective_of(target, draft, batch, anchors)
    forward = type(target).forward

    def forward_with_all_logits(self, *args, **kwargs):
        assert "logits_to_keep" not in kwargs
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(target), "_supports_logits_to_keep", lambda self: False)
    monkeypatch.setattr(type(target), "forward", forward_with_all_logits)
    torch.testing.assert_close(
        objective_of(target, draft, batch, anchors).loss_sum, expected.loss_sum, rtol=1e-10, atol=1e-10
    )


def test_half_precision_stays_close():
    target, draft = make_pair()
    batch = mixed_batch()
    anchors = anchors_of(batch)
    expected = objective_of(target, draft, batch, anchors)
    draft.float()
    target.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        objective = objective_of(target, draft, batch, anchors)
    assert objective.loss_sum.dtype == torch.float32
    torch.testing.assert_close(objective.loss_sum.double(), expected.loss_sum, rtol=0.1, atol=0)
    objective.loss_sum.backward()
    for name, parameter in draft.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


# Future predictions


def record_futures(monkeypatch) -> list[torch.Tensor]:
    """Collects what `TargetRunner.contemplate` returns while the objective is computed."""
    recorded: list[torch.Tensor] = []
    contemplate = TargetRunner.contemplate

    def recording(self, *args, **kwargs):
        recorded.append(contemplate(self, *args, **kwargs))
        return recorded[-1]

    monkeypatch.setattr(TargetRunner, "contemplate", recording)
    return recorded


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "qwen3", "no soft prompts", "rotated soft prompts", "single experts"])
def test_training_and_decoding_foresee_the_same(name, monkeypatch):
    target, draft = make_pair(name)
    root, depth = 4, 5  # the prompt is 0..3
    text = make_text((root, depth + 4), seed=7)
    ids = text.input_ids

    # Decoding: the prompt's own contemplate row, then a round whose tree is the true continuation as a chain.
    runner = TargetRunner(target, draft.config, draft.future_channel)
    cache = DynamicCache(config=target.config)
    outputs = target(ids[:, :root], cache=cache, output_hidden_states=runner.recorded)
    routed_by = runner.taps(outputs.hidden_states)[:, -1]
    visible = torch.ones(1, root, dtype=torch.bool)
    place = torch.tensor([[root]])
    of_prompt = runner.contemplate(cache, routed_by[:, None], place, place, visible[:, None])[0, 0]
    chain = ids[:, root : root + depth + 1]
    parents = torch.arange(depth + 1)[None].sub(1).clamp(min=0)
    tree = DraftTree.from_parents(chain, parents, torch.zeros(chain.shape))
    let_grow(cache)
    of_nodes = runner.verify(
        tree, torch.arange(depth + 1)[None], routed_by, cache, torch.tensor([root]), visible
    ).futures[0]

    # Training: an anchor at each of these tokens, routed by the last prompt token, that is with lag d + 1 at depth d.
    positions = torch.arange(root - 1, root + depth + 1)[None]
    exists = torch.ones_like(positions, dtype=torch.bool)
    of_row = torch.full_like(ids, -1)
    of_row[:, root - 1 : root + depth + 1] = torch.arange(depth + 2)
    recorded = record_futures(monkeypatch)
    objective_of(target, draft, text, Anchors(positions, exists, torch.full_like(positions, root - 1), of_row))
    (futures,) = recorded
    torch.testing.assert_close(futures[0, 0], of_prompt, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(futures[0, 1:], of_nodes, rtol=1e-10, atol=1e-10)
    # The routing is not without effect on this target and draft, else the lag would be untested.
    other = torch.full_like(positions, root - 2)
    objective_of(target, draft, text, Anchors(positions, exists, other, of_row))
    assert (recorded[-1] - futures).abs().max() > 1e-3


# Gradients


def gradients(target, draft, batch: Batch, anchors: Anchors | None) -> dict[str, torch.Tensor | None]:
    draft.zero_grad()
    objective_of(target, draft, batch, anchors).loss_sum.backward()
    return {name: parameter.grad for name, parameter in draft.named_parameters()}


@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize("name", ["llama", "own width and embeddings"])
def test_everything_in_the_draft_is_taught_and_nothing_in_the_target(name, experts):
    target, draft = make_pair(name, num_contemplate_experts_per_token=experts, num_future_experts_per_token=experts)
    nn.init.zeros_(draft.future_channel.future_residual.weight)  # as a new draft has it
    batch = mixed_batch()
    for parameter, gradient in gradients(target, draft, batch, anchors_of(batch)).items():
        assert gradient is not None and gradient.isfinite().all() and gradient.any(), parameter
    assert all(p.grad is None and not p.requires_grad for p in target.parameters())

    for parameter, gradient in gradients(target, draft, batch, None).items():
        if parameter.startswith("future_channel."):
            assert gradient is None, parameter
        else:
            assert gradient.isfinite().all() and gradient.any(), parameter


def test_only_contemplate_rows_carry_a_graph_through_the_target():
    target, draft = make_pair()
    target.requires_grad_(True)  # so that the prefix would have a graph if it were let
    batch = mixed_batch()
    anchors = anchors_of(batch)
    calls = []

    def record(module, args, kwargs, output):
        hidden_states = output[0] if isinstance(output, tuple) else output
        calls.append((hidden_states.shape[1], hidden_states.requires_grad))

    with target.model.layers[-1].register_forward_hook(record, with_kwargs=True):
        objective_of(target, draft, batch, anchors)
    assert calls == [(batch.input_ids.shape[1], False), (anchors.positions.shape[1], True)]


def exact_norm(norm: LlamaRMSNorm, hidden_states: torch.Tensor) -> torch.Tensor:
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    return norm.weight * hidden_states * torch.rsqrt(variance + norm.variance_epsilon)


@pytest.mark.parametrize(
    "name",
    [
        "future_channel.soft_prompts",
        "future_channel.contemplate_token.experts",
        "future_channel.future_token.experts",
        "future_channel.future_projection.weight",
        "future_channel.future_residual.weight",
        "layers.0.self_attn.k_proj.weight",
        "layers.0.mlp.down_proj.weight",
        "lm_head.weight",
    ],
)
def test_gradients_are_those_of_finite_differences(name, monkeypatch):
    # Norms compute in fp32, whose rounding would swamp a difference.
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)
    target, draft = make_pair()
    batch = mixed_batch()
    anchors = anchors_of(batch)
    gradient = gradients(target, draft, batch, anchors)[name]
    parameter = draft.get_parameter(name)
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    losses = []
    with torch.no_grad():
        for shift in (1e-5, -2e-5):
            parameter += shift * direction
            losses.append(objective_of(target, draft, batch, anchors).loss_sum)
        parameter += 1e-5 * direction
    measured = (losses[0] - losses[1]) / 2e-5
    torch.testing.assert_close((gradient * direction).sum(), measured, rtol=1e-6, atol=1e-7)
