"""The chunked loss against plain autograd over all rows at once."""

import pytest
import torch
from torch import nn

from transformers_confu.training import chunked_loss
from transformers_confu.training.chunked_loss import ChunkedLoss


STEPS, ROWS, HIDDEN, VOCABULARY, TEACHERS = 3, 5, 6, 17, 5


def make_inputs(dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    teacher_logits = 3 * normal(TEACHERS, VOCABULARY)
    return {
        "hidden_states": normal(STEPS, ROWS, HIDDEN).to(dtype).requires_grad_(),
        "weight": normal(VOCABULARY, HIDDEN).to(dtype).requires_grad_(),
        "teachers": torch.randint(TEACHERS, (STEPS, ROWS), generator=generator),
        "counts": torch.arange(STEPS)[:, None] < torch.tensor([3, 1, 0, 2, 3]),
        "probabilities": teacher_logits.softmax(-1),
        "out_of_vocabulary_mass": torch.rand(TEACHERS, generator=generator, dtype=torch.float64) / 2,
        "entropies": torch.distributions.Categorical(logits=teacher_logits).entropy(),
    }


@pytest.mark.parametrize("decay", [0.7, None])
@pytest.mark.parametrize("rows_per_chunk", [1, 7, 64])
def test_value_gradients_and_counts_are_those_of_plain_autograd(rows_per_chunk, decay, monkeypatch):
    monkeypatch.setattr(chunked_loss, "rows_per_chunk", lambda device: rows_per_chunk)
    inputs = make_inputs()
    total, choices, acceptances = ChunkedLoss.apply(*inputs.values(), decay)
    (3 * total).backward()

    plain = make_inputs()
    expected = torch.zeros((), dtype=torch.float64)
    for row, length in enumerate(plain["counts"].sum(dim=0).tolist()):
        values, accepted = [], []
        for step in range(length):
            logits = nn.functional.linear(plain["hidden_states"][step, row], plain["weight"])
            teacher = plain["teachers"][step, row]
            p, outside = plain["probabilities"][teacher], plain["out_of_vocabulary_mass"][teacher]
            values.append(nn.functional.kl_div(logits.log_softmax(-1), p, reduction="sum"))
            accepted.append(torch.minimum((1 - outside) * p, logits.detach().softmax(-1)).sum())
            torch.testing.assert_close(choices[step, row], logits.argmax())
            torch.testing.assert_close(acceptances[step, row], accepted[-1])
        for step, value in enumerate(values):
            expected = expected + value * (weight_of(step, accepted) if decay is None else decay**step)
    (3 * expected).backward()

    torch.testing.assert_close(total, expected.detach())
    for name in ("hidden_states", "weight"):
        torch.testing.assert_close(inputs[name].grad, plain[name].grad)


def weight_of(step: int, accepted: list[torch.Tensor]) -> float:
    """What the expected length of a row's draft gains by the logarithm of the acceptance at a step, by autograd."""
    logs = [((1 + probability) / 2).log().requires_grad_() for probability in accepted]
    length = sum(torch.stack(logs[: last + 1]).sum().exp() for last in range(len(logs)))
    return float(torch.autograd.grad(length, logs[step])[0])


def test_autocast_computes_in_bfloat16_and_gives_gradients_of_the_parameters_dtype():
    inputs, reference = (make_inputs(torch.float32) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        total, *_ = ChunkedLoss.apply(*inputs.values(), 0.8)
    total.backward()
    exact, *_ = ChunkedLoss.apply(*reference.values(), 0.8)
    exact.backward()
    assert total != exact and abs(total - exact) < 0.02 * exact
    for name in ("hidden_states", "weight"):
        assert inputs[name].grad.dtype == torch.float32
        torch.testing.assert_close(inputs[name].grad, reference[name].grad, rtol=0.1, atol=0.05)
