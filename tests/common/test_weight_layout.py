"""Packed weights change nothing but how fast they are multiplied."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from helpers import make_tiny_draft, make_tiny_target
from transformers_confu.common.weight_layout import PackedLinear, copy_in_other_layout, use_packed_weights
from transformers_confu.inference.round_costs import costs_key


PROMPT = torch.tensor([[3, 4, 5, 2, 7]])
GREEDY = {"max_new_tokens": 20, "do_sample": False}


class PackedProducts(TorchDispatchMode):
    """Counts them."""

    def __enter__(self):
        self.count = 0
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.mkldnn._linear_pointwise.default
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def packed_products(layer: nn.Module) -> int:
    rows = torch.randn(2, 3, layer.in_features)
    with PackedProducts() as products:
        output = layer(rows)
    torch.testing.assert_close(output, nn.functional.linear(rows, layer.weight, layer.bias))
    return products.count


@pytest.mark.parametrize("tied", [False, True])
def test_a_packed_model_is_the_same_model(tmp_path, tied):
    target = make_tiny_target(tie_word_embeddings=tied).float()
    draft = make_tiny_draft(target).float()
    expected, before = target.generate(PROMPT, **GREEDY), {k: v.clone() for k, v in target.state_dict().items()}
    key = costs_key(target, draft)
    linear = {module.weight for module in target.modules() if isinstance(module, nn.Linear)}
    assert use_packed_weights(target) == sum(weight.nbytes for weight in linear)
    assert use_packed_weights(target) == 0  # not twice
    assert costs_key(target, draft) != key
    assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())
    assert tied == (target.lm_head.weight is target.model.embed_tokens.weight)
    assert packed_products(target.lm_head) == 1
    assert torch.equal(target.generate(PROMPT, **GREEDY), expected)
    use_packed_weights(draft)
    assert torch.equal(target.generate(PROMPT, assistant_model=draft, **GREEDY), expected)
    target.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert all(torch.equal(before[name], tensor) for name, tensor in loaded.state_dict().items())


def test_a_packed_layer_follows_its_weight():
    layer = nn.Linear(8, 6)
    use_packed_weights(layer)
    assert packed_products(layer) == 1
    layer(torch.randn(2, 8)).sum().backward()
    assert layer.weight.grad is not None
    copied = copy.deepcopy(layer)
    with torch.no_grad():
        layer.weight.add_(1)
        copied.bias.add_(1)
    assert packed_products(layer) == packed_products(copied) == 0
    use_packed_weights(layer := nn.Linear(8, 6))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert layer(torch.randn(2, 8)).dtype == torch.bfloat16
    assert layer.double()(torch.ones(1, 8, dtype=torch.double)).dtype == torch.double


def test_a_packed_layer_is_not_deceived_by_a_weight_at_the_address_of_the_one_before():
    for _ in range(50):
        use_packed_weights(layer := nn.Linear(64, 64))
        layer.to(torch.bfloat16).to(torch.float32)  # rounded, and often where the first one was
        assert packed_products(layer) == 0


def test_only_what_is_in_fp32_is_packed():
    assert use_packed_weights(make_tiny_target()) == 0  # fp64


def test_a_copy_in_the_other_layout():
    target = make_tiny_target().float()
    other = copy_in_other_layout(target)
    back = copy_in_other_layout(other)
    for model, kind in ((target, nn.Linear), (other, PackedLinear), (back, nn.Linear)):
        assert {type(layer.mlp.up_proj) for layer in model.model.layers} == {kind}
        assert torch.equal(model.generate(PROMPT, **GREEDY), target.generate(PROMPT, **GREEDY))
