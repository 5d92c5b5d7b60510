"""The chunked loss against plain autograd over all rows at once."""

import pytest
import torch
from torch import nn

from transformers_confu.training import chunked_loss
from transformers_confu.training.chunked_loss import ChunkedLoss
from transformers_confu.training.losses import LOSSES, acceptance


ROWS, HIDDEN, VOCABULARY, TEACHERS = 11, 6, 17, 5


def make_inputs(dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    teacher_logits = 3 * normal(TEACHERS, VOCABULARY)
    return {
        "hidden_states": normal(ROWS, HIDDEN).to(dtype).requires_grad_(),
        "weight": normal(VOCABULARY, HIDDEN).to(dtype).requires_grad_(),
        "teachers": torch.randint(TEACHERS, (ROWS,), generator=generator),
        "probabilities": teacher_logits.softmax(-1),
        "out_of_vocabulary_mass": torch.rand(TEACHERS, generator=generator, dtype=torch.float64) / 2,
        "entropies": torch.distributions.Categorical(logits=teacher_logits).entropy(),
        "row_weights": torch.rand(ROWS, generator=generator, dtype=torch.float64),
    }


@pytest.mark.parametrize("rows_per_chunk", [1, 4, 64])
@pytest.mark.parametrize("loss", LOSSES)
def test_value_gradients_and_counts_are_those_of_plain_autograd(loss, rows_per_chunk, monkeypatch):
    monkeypatch.setattr(chunked_loss, "rows_per_chunk", lambda device: rows_per_chunk)
    inputs = make_inputs()
    total, choices, acceptances = ChunkedLoss.apply(*inputs.values(), loss)
    (3 * total).backward()

    plain = make_inputs()
    logits = nn.functional.linear(plain["hidden_states"], plain["weight"])
    taught = plain["probabilities"][plain["teachers"]], plain["out_of_vocabulary_mass"][plain["teachers"]]
    expected = (LOSSES[loss](*taught, logits) * plain["row_weights"]).sum()
    (3 * expected).backward()

    torch.testing.assert_close(total, expected.detach())
    for name in ("hidden_states", "weight"):
        torch.testing.assert_close(inputs[name].grad, plain[name].grad)
    torch.testing.assert_close(choices, logits.argmax(-1))
    torch.testing.assert_close(acceptances, acceptance(*taught, logits.detach()))


def test_autocast_computes_in_bfloat16_and_gives_gradients_of_the_parameters_dtype():
    inputs, reference = (make_inputs(torch.float32) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        total, *_ = ChunkedLoss.apply(*inputs.values(), "kl")
    total.backward()
    exact, *_ = ChunkedLoss.apply(*reference.values(), "kl")
    exact.backward()
    assert total != exact and abs(total - exact) < 0.02 * exact
    for name in ("hidden_states", "weight"):
        assert inputs[name].grad.dtype == torch.float32
        torch.testing.assert_close(inputs[name].grad, reference[name].grad, rtol=0.1, atol=0.05)
