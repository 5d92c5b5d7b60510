"""Another layout of the weights changes nothing but how fast they are multiplied."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers import make_tiny_draft, make_tiny_target
from transformers_confu.common.weight_layout import copy_in_other_layout, use_column_major_weights


PROMPT = torch.tensor([[3, 4, 5, 2, 7]])
GREEDY = {"max_new_tokens": 20, "do_sample": False}


@pytest.mark.parametrize("tied", [False, True])
def test_a_laid_out_model_is_the_same_model(tmp_path, tied):
    target = make_tiny_target(tie_word_embeddings=tied)
    expected, before = target.generate(PROMPT, **GREEDY), {k: v.clone() for k, v in target.state_dict().items()}
    assert use_column_major_weights(target) == 5 * 7 + 1
    assert use_column_major_weights(target) == 0  # not twice
    weight = target.model.layers[0].mlp.up_proj.weight
    assert weight.t().is_contiguous() and not weight.is_contiguous()
    assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())
    assert tied == (target.lm_head.weight is target.model.embed_tokens.weight)
    assert torch.equal(target.generate(PROMPT, **GREEDY), expected)
    draft = make_tiny_draft(target)
    use_column_major_weights(draft)
    assert torch.equal(target.generate(PROMPT, assistant_model=draft, **GREEDY), expected)
    target.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert all(torch.equal(before[name], tensor) for name, tensor in loaded.state_dict().items())


def test_a_copy_in_the_other_layout():
    target = make_tiny_target()
    other = copy_in_other_layout(target)
    back = copy_in_other_layout(other)
    for model, is_row_major in ((target, True), (other, False), (back, True)):
        assert all(layer.mlp.up_proj.weight.is_contiguous() == is_row_major for layer in model.model.layers)
        assert torch.equal(model.generate(PROMPT, **GREEDY), target.generate(PROMPT, **GREEDY))
