"""The unrolled draft against the draft as it decodes: row by row, step by step, with a real cache."""

from collections.abc import Iterator

import pytest
import torch
from transformers import DynamicCache

from helpers import make_tiny_draft, make_tiny_target
from transformers_confu import ConFuDraftModel
from transformers_confu.training.unroll import unroll


BATCH, LENGTH, STEPS = 2, 13, 4

DRAFTS = {
    "grouped heads": ("llama", {}),
    "heads wider than the hidden size": ("qwen3", {}),
    "own width and embeddings": ("llama", {"hidden_size": 24, "num_key_value_heads": 1, "head_dim": 10}),
    "five taps": ("llama", {"target_hidden_state_indices": [0, 1, 2, 3, 5]}),
    "no residual": ("llama", {"use_future_residual": False}),
    "single experts": ("llama", {"num_future_experts_per_token": 1}),
    "attention with bias": ("llama", {"attention_bias": True}),
    "norms of EAGLE-3.1": ("llama", {"fc_norm": True, "norm_output": True, "use_qk_norm": True}),
    "norms of speculators": ("llama", {"norm_before_fc": True, "norm_before_residual": True}),
}


def make_draft(name: str = "grouped heads") -> ConFuDraftModel:
    kind, overrides = DRAFTS[name]
    draft = make_tiny_draft(make_tiny_target(kind), **overrides)
    if draft.config.attention_bias:  # starts at zero
        for projection in (draft.layers[0].self_attn.q_proj, draft.layers[0].self_attn.k_proj):
            torch.nn.init.normal_(projection.bias, generator=torch.Generator().manual_seed(3))
    return draft


def make_inputs(draft: ConFuDraftModel, seed: int = 0) -> dict[str, torch.Tensor]:
    """Arbitrary embeddings, taps and futures for all rows of two texts, the second of which starts at position 5."""
    generator = torch.Generator().manual_seed(seed)

    def normal(width: int) -> torch.Tensor:
        return torch.randn(BATCH, LENGTH, width, generator=generator, dtype=draft.dtype)

    config = draft.config
    rows = torch.arange(LENGTH).expand(BATCH, -1)
    return {
        "inputs_embeds": normal(config.hidden_size),
        "taps": normal(config.taps_size),
        "position_ids": rows + torch.tensor([[0], [5]]),
        "sees": rows[:, None] <= rows[..., None],
        "rows": rows,
        "future_states": normal(config.future_size),
        "has_future": torch.rand(BATCH, LENGTH, generator=generator) < 0.6,
    }


def unrolled(draft: ConFuDraftModel, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Outputs of all steps; the taps are fused first."""
    features = draft.fuse_taps(inputs["taps"])
    rest = {name: value for name, value in inputs.items() if name != "taps"}
    return list(unroll(draft, features=features, **rest, num_steps=STEPS))


def decode_row(
    draft: ConFuDraftModel, inputs: dict[str, torch.Tensor], text: int, row: int, first: int = 0
) -> Iterator[torch.Tensor]:
    """Features `(H,)` of the steps that start from one row, as decoding computes them: true rows `first`..`row`, then
    one drafted row after the other, fed the true next token."""
    embeds, taps = inputs["inputs_embeds"][text, None], inputs["taps"][text, None]
    positions = inputs["position_ids"][text, None]
    cache = DynamicCache(config=draft.config)
    features = draft.fuse_taps(taps[:, first : row + 1])
    future = None
    if inputs["future_states"] is not None and inputs["has_future"][text, row]:
        future = draft.future(inputs["future_states"][text, row][None, None], features[:, -1:])
    if row > first:  # what earlier rounds have stored
        draft(
            inputs_embeds=embeds[:, first + 1 : row + 1],
            features=features[:, :-1],
            position_ids=positions[:, first:row],
            cache=cache,
            num_queries=1,
        )
    features, next_token = features[:, -1:], row + 1
    while next_token < LENGTH:
        output = draft(
            inputs_embeds=embeds[:, next_token, None],
            features=features,
            position_ids=positions[:, next_token - 1, None],
            cache=cache,
            future=future,
        )
        features = output.features
        yield features[0, 0]
        next_token += 1


def assert_steps_decode(draft: ConFuDraftModel, inputs: dict[str, torch.Tensor], first: tuple[int, ...] = (0, 0)):
    steps = unrolled(draft, inputs)
    assert len(steps) == STEPS
    compared = 0
    for text in range(BATCH):
        for number, row in enumerate(inputs["rows"][text].tolist()):
            if row < first[text]:
                continue
            for step, expected in zip(range(STEPS), decode_row(draft, inputs, text, row, first[text]), strict=False):
                actual = draft.next_features(steps[step][text, number])
                torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
                compared += 1
    assert compared >= BATCH * 12


@torch.no_grad()
@pytest.mark.parametrize("has_future", [True, False], ids=["with f", "without f"])
@pytest.mark.parametrize("name", DRAFTS)
def test_training_steps_are_decoding_steps(name, has_future):
    draft = make_draft(name)
    inputs = make_inputs(draft)
    assert inputs["has_future"].any() and not inputs["has_future"].all()
    if not has_future:
        inputs |= {"future_states": None, "has_future": None}
    assert_steps_decode(draft, inputs)


@torch.no_grad()
def test_a_row_depends_on_no_other_rows_future():
    draft = make_draft()
    inputs = make_inputs(draft)
    before = unrolled(draft, inputs)
    inputs["future_states"] = inputs["future_states"].clone()
    inputs["future_states"][0, 3] += 1
    inputs["has_future"][0, 3] = True
    after = unrolled(draft, inputs)
    for step in range(STEPS):
        changed = (before[step] != after[step]).any(dim=-1).nonzero().tolist()
        assert changed == [[0, 3]]
