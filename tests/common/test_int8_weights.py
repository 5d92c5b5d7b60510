"""A draft with weights of eight bits: nearly the same draft, and the same text."""

import pytest
import torch

from helpers import make_tiny_draft, make_tiny_target
from transformers_confu.common import loading
from transformers_confu.common.int8_weights import Int8Linear, int8_pays, use_int8_weights
from transformers_confu.common.loading import load_decoding_draft
from transformers_confu.inference.round_costs import costs_key


PROMPT = torch.tensor([[3, 4, 5, 2, 7]])


@pytest.mark.parametrize(("outputs", "inputs"), [(32, 64), (96, 32), (160, 224)])
def test_a_rounded_product_is_near_the_exact_one(outputs, inputs):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator) * torch.logspace(-3, 3, outputs)[:, None]
    weight[1] = 0
    rows = torch.randn(2, 3, inputs, generator=generator).bfloat16()
    expected = rows.double() @ weight.double().t()
    found = Int8Linear(weight)(rows)
    assert found.dtype == torch.bfloat16 and found.shape == expected.shape
    # Each weight is off by half a step at most, of 127 up to the largest of its output; the product is one of bf16.
    most = weight.double().abs().amax(dim=1) / 253 * rows.double().abs().sum(dim=-1, keepdim=True)
    assert ((found.double() - expected).abs() <= most + 2**-8 * expected.abs()).all()


def test_the_text_is_that_of_plain_generation(tmp_path):
    target = make_tiny_target(vocab_size=96)
    draft = make_tiny_draft(target, dtype=torch.bfloat16)
    key = costs_key(target, draft)
    before = draft.lm_head.weight.detach().float()
    rounded = use_int8_weights(draft)
    # fc, five of the layer, head, two projections of f; no keys, values and routers, which have 16 and 8 outputs.
    assert rounded == sum(type(module) is Int8Linear for module in draft.modules()) == 9
    head = draft.lm_head
    torch.testing.assert_close(head.steps * head.scales.float()[:, None], before, atol=0.02, rtol=0)
    expected = target.generate(PROMPT, max_new_tokens=40, do_sample=False)
    found = target.generate(PROMPT, assistant_model=draft, max_new_tokens=40, do_sample=False)
    assert torch.equal(found, expected)
    assert costs_key(target, draft) != key
    with pytest.raises(ValueError, match="load it anew to save it"):
        draft.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="for bf16 on a CPU"):
        use_int8_weights(make_tiny_draft(target))


def test_a_draft_is_rounded_where_that_pays(tmp_path, monkeypatch):
    target = make_tiny_target(vocab_size=96)
    draft = make_tiny_draft(target)
    assert not int8_pays(draft)  # too small to wait for its weights
    draft.save_pretrained(tmp_path)
    assert load_decoding_draft(tmp_path, target).dtype == target.dtype
    monkeypatch.setattr(loading, "int8_pays", lambda draft: True)
    assert type(load_decoding_draft(tmp_path, target).lm_head) is Int8Linear
