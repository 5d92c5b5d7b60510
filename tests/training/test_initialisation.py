"""A draft that starts from its target: what is taken over, what is not and says so, and that it helps."""

import logging

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from helpers import make_family, make_tiny_target, rotate
from transformers_confu import ConFuConfig
from transformers_confu.inference.cached_rows import filled_layers
from transformers_confu.training.initialisation import warm_start


TOKENS = torch.tensor([90, 3, 41, 7, 66, 15, 23, 58, 80, 11])
TAPS = {"target_hidden_state_indices": [1, 2, 4]}


def config_for(target, **overrides) -> ConFuConfig:
    return ConFuConfig.from_target(
        target.config, **(TAPS | {"draft_vocab_size": len(TOKENS), "num_soft_prompts": 3} | overrides)
    )


@pytest.mark.parametrize("kind, use_qk_norm", [("llama", False), ("qwen3", True)])
def test_weights_of_the_target_are_taken_over(kind, use_qk_norm, caplog):
    target = make_tiny_target(kind, dtype=torch.float32)
    for parameter in target.parameters():  # norms start at 1 on both sides
        parameter.data += 0.01 * torch.rand_like(parameter)
    with caplog.at_level(logging.WARNING):
        draft = warm_start(target, TOKENS, config_for(target, use_qk_norm=use_qk_norm))
    assert not caplog.records
    assert {parameter.dtype for parameter in draft.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in draft.parameters())

    assert draft.draft_token_ids.tolist() == sorted(TOKENS.tolist())
    assert draft.t2d.nonzero()[:, 0].tolist() == sorted(TOKENS.tolist())
    ours, theirs, width = draft.layers[0], target.model.layers[-1], target.config.hidden_size
    expected = [
        (draft.norm, target.model.norm.weight),
        (draft.lm_head, target.lm_head.weight[sorted(TOKENS.tolist())]),
        (ours.hidden_norm, theirs.input_layernorm.weight),
    ]
    alike = ["post_attention_layernorm", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    alike += ["self_attn.q_norm", "self_attn.k_norm"] if use_qk_norm else []
    expected += [(ours.get_submodule(name), theirs.get_submodule(name).weight) for name in alike]
    assert all(torch.equal(module.weight, weight) for module, weight in expected)
    for name in ("q_proj", "k_proj", "v_proj"):
        taken = getattr(ours.self_attn, name).weight
        torch.testing.assert_close(taken[:, width:], getattr(theirs.self_attn, name).weight, rtol=0, atol=0)
        assert 0 < taken[:, :width].std() < 0.1, "the embedding half stays random"

    taps = torch.randn(4, draft.config.taps_size)
    torch.testing.assert_close(draft.fc(taps), taps[:, -width:])  # the highest tap
    torch.testing.assert_close(
        draft.future_channel.contemplate_token.experts.std(),
        target.get_input_embeddings().weight.std(),
        rtol=0.2,
        atol=0,
    )


def test_norms_of_taps_start_at_the_size_of_the_taps():
    """The feature of another text then has the size of its highest tap, as it has without these norms."""
    target = make_tiny_target(dtype=torch.float32)
    target.get_input_embeddings().weight.data *= 40
    draft = warm_start(target, TOKENS, config_for(target, fc_norm=True))
    states = target(torch.tensor([[5, 91, 33, 8, 61, 12, 74, 27]]), output_hidden_states=True).hidden_states
    taps = [states[index] for index in TAPS["target_hidden_state_indices"]]
    sizes = [float(tap.detach().square().mean().sqrt()) for tap in taps]
    assert [float(norm.weight.mean()) for norm in draft.fc_norm] == pytest.approx(sizes, rel=0.25)
    assert float(draft.fuse_taps(torch.cat(taps, dim=-1)).detach().square().mean().sqrt()) == pytest.approx(
        sizes[-1], rel=0.25
    )


@pytest.mark.parametrize("kind, use_qk_norm", [("llama", True), ("qwen3", False)])
def test_queries_and_keys_are_not_taken_over_without_their_norms(kind, use_qk_norm, caplog):
    target = make_tiny_target(kind, dtype=torch.float32)
    for projection in (target.model.layers[-1].self_attn.q_proj, target.model.layers[-1].self_attn.k_proj):
        projection.weight.data *= 100  # a norm behind it takes no notice
    with caplog.at_level(logging.WARNING):
        draft = warm_start(target, TOKENS, config_for(target, use_qk_norm=use_qk_norm))
    assert "self_attn.q_proj, self_attn.k_proj of the target have other shapes, other norms" in caplog.text
    ours, theirs = draft.layers[0].self_attn, target.model.layers[-1].self_attn
    assert ours.q_proj.weight.std() < 0.1 and ours.k_proj.weight.std() < 0.1
    assert torch.equal(ours.v_proj.weight[:, target.config.hidden_size :], theirs.v_proj.weight)


@pytest.mark.parametrize("kind, rotated", [("llama", False), ("llama", True), ("hybrid", False)])
def test_soft_prompts_are_the_keys_and_values_of_a_text(kind, rotated):
    """At its beginning; rotated ones end just in front of a round's root. Recurrent layers have none."""
    target = make_tiny_target(kind, dtype=torch.float32)
    ids, root = torch.tensor([4, 8, 15]), 40 if rotated else 3
    draft = warm_start(target, TOKENS, config_for(target, rotate_soft_prompts=rotated), soft_prompt_ids=ids)
    cache = DynamicCache(config=target.config)
    target(ids[None], position_ids=torch.arange(root - 3, root)[None], cache=cache)
    for (keys, values), layer in zip(draft.future_channel.soft_prompts, cache.layers, strict=True):
        if layer not in filled_layers(cache):
            continue
        keys = rotate(keys, root) if rotated else keys
        torch.testing.assert_close(keys, layer.keys[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(values, layer.values[0], rtol=1e-4, atol=1e-4)


def test_soft_prompts_need_as_many_tokens():
    target = make_tiny_target()
    for ids in ([4], [4, 8], [4, 8, 15, 16]):  # a single one would be broadcast
        with pytest.raises(ValueError, match=rf"`soft_prompt_ids` holds {len(ids)} tokens; the draft has 3 soft"):
            warm_start(target, TOKENS, config_for(target), soft_prompt_ids=torch.tensor(ids))
    no_prompts = config_for(target, num_soft_prompts=0)
    assert warm_start(target, TOKENS, no_prompts, torch.tensor([], dtype=torch.long)) is not None


class OtherLinear(nn.Module):
    """A quantised or offloaded linear layer, as far as its attributes go: packed numbers, and some `weight`."""

    def __init__(self, linear: nn.Linear, make_weight):
        super().__init__()
        self._packed = linear.weight.detach().clone()
        if make_weight is not None:
            setattr(self, "weight", make_weight(self._packed))  # noqa: B010 - a parameter or a method

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden_states, self._packed)


@pytest.mark.parametrize(
    "make_weight",
    [
        None,
        lambda packed: lambda: packed,  # as PyTorch's own quantised layers: the weight is a method
        lambda packed: nn.Parameter((packed * 100).to(torch.float8_e4m3fn), requires_grad=False),  # needs its scale
        lambda packed: nn.Parameter(packed.to("meta")),  # the weight is elsewhere
    ],
    ids=["no weight", "method", "fp8", "offloaded"],
)
def test_quantised_and_offloaded_layers_are_left_out_with_a_warning(make_weight, caplog):
    target = make_tiny_target(dtype=torch.float32)
    last = target.model.layers[-1]
    last.self_attn.q_proj = OtherLinear(last.self_attn.q_proj, make_weight)
    last.mlp.down_proj = OtherLinear(last.mlp.down_proj, make_weight)
    target.lm_head = OtherLinear(target.lm_head, make_weight)
    with caplog.at_level(logging.WARNING):
        draft = warm_start(target, TOKENS, config_for(target), soft_prompt_ids=torch.tensor([4, 8, 15]))
    (record,) = caplog.records
    for name in ("q_proj", "down_proj", "lm_head"):
        assert name in record.message
    for name in ("k_proj", "up_proj", "hidden_norm"):
        assert name not in record.message
    for parameter in draft.parameters():
        assert parameter.isfinite().all()
    assert 0 < draft.lm_head.weight.std() < 0.1
    torch.testing.assert_close(draft.layers[0].mlp.up_proj.weight, last.mlp.up_proj.weight)


@pytest.mark.parametrize("family", ["GPT2", "Falcon"])  # `h` and Conv1D; `query_key_value`
def test_a_target_without_layers_of_that_name_starts_what_can_be_started(family, caplog):
    target = make_family(family).float()
    with caplog.at_level(logging.WARNING):
        draft = warm_start(target, TOKENS, config_for(target))
    assert "of the target have other shapes, other norms or no weights; left random" in caplog.text
    assert "lm_head" not in caplog.text
    expected = target.get_output_embeddings().weight[sorted(TOKENS.tolist())]
    torch.testing.assert_close(draft.lm_head.weight, expected, rtol=0, atol=0)


class Quantised(torch.Tensor):
    """As torchao holds a weight: it shows a plain dtype and can dequantise itself, and no more."""

    @staticmethod
    def __new__(cls, weight: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, device=weight.device)

    def __init__(self, weight: torch.Tensor):
        self.packed = weight

    def __tensor_flatten__(self):
        return ["packed"], None

    @staticmethod
    def __tensor_unflatten__(tensors, meta, size, stride):
        return Quantised(tensors["packed"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].packed)
        raise AttributeError(f"{func} of a packed weight")

    def dequantize(self) -> torch.Tensor:
        return self.packed


def test_weights_that_can_be_dequantised_are(caplog):
    target = make_tiny_target(dtype=torch.float32)
    for module in (target.lm_head, target.model.layers[-1].mlp.up_proj):
        module.weight = nn.Parameter(Quantised(module.weight.detach()), requires_grad=False)
    with caplog.at_level(logging.WARNING):
        draft = warm_start(target, TOKENS, config_for(target))
    assert not caplog.records
    plain = make_tiny_target(dtype=torch.float32)
    assert torch.equal(draft.lm_head.weight, plain.lm_head.weight[sorted(TOKENS.tolist())])
    assert torch.equal(draft.layers[0].mlp.up_proj.weight, plain.model.layers[-1].mlp.up_proj.weight)


def test_a_draft_of_another_width_starts_random_where_it_must(caplog):
    target = make_tiny_target(dtype=torch.float32)
    config = config_for(target, hidden_size=24, num_attention_heads=2, num_key_value_heads=1, head_dim=12)
    with caplog.at_level(logging.WARNING):
        draft = warm_start(target, TOKENS, config, soft_prompt_ids=torch.tensor([4, 8, 15]))
    assert "left random" in caplog.text and "lm_head" in caplog.text
    assert draft.embed_tokens.weight.shape == (97, 24)
    taps = torch.randn(200, config.taps_size)
    assert 0.8 < draft.fc(taps).std() < 1.25  # of the size of its input


def test_scales_are_taken_over_as_the_target_applies_them():
    """Gemma keeps the scale of a norm less 1, and scales embeddings as it looks them up."""
    target = make_family("Gemma3Text", rms_norm_eps=1e-12, layer_types=["full_attention"] * 5)
    torch.nn.init.normal_(target.model.norm.weight)
    draft = warm_start(target, torch.arange(97), ConFuConfig.from_target(target.config)).double()
    rows = torch.randn(3, 32, dtype=torch.float64)
    assert torch.allclose(draft.norm(rows), target.model.norm(rows), rtol=1e-5, atol=1e-5)
    size = float(target.get_input_embeddings()(torch.arange(97)).detach().std())  # sqrt(32) times its weights'
    assert float(draft.future_channel.contemplate_token.experts.detach().std()) == pytest.approx(size, rel=0.2)
