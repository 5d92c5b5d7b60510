"""Muon beside another optimiser: its steps, and that both go on where they stopped."""

import pytest
import torch
from torch import nn

from transformers_confu.training.muon import Muon, MuonBeside


# Of matrices with a mean square of 1, as Muon's authors measured it for AdamW (arXiv 2502.16982).
SIZE_OF_ADAMW = 0.2


@pytest.fixture(params=["float32", "bfloat16"], autouse=True)
def dtype(request, monkeypatch):
    """That this machine computes in."""
    monkeypatch.setattr("transformers_confu.training.muon.default_dtype", lambda device: request.param)


@pytest.mark.parametrize("shape", [(6, 6), (4, 12), (12, 4)])
def test_steps_are_those_of_torch(shape):
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    settings = {"lr": 0.1, "weight_decay": 0.1}
    reference = torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **settings)
    for optimizer in (Muon([ours], **settings), reference):
        generator.manual_seed(0)
        for size in (1.0, 100.0, 0.01):
            for group in optimizer.param_groups:
                (parameter,) = group["params"]
                parameter.grad = size * torch.randn(shape, generator=generator)
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.015)  # theirs are of bfloat16
    assert (ours - 1).abs().max() > 0.1


def test_steps_are_orthogonal_and_as_large_as_those_of_adamw():
    torch.manual_seed(0)
    matrix, vector = nn.Parameter(torch.randn(4, 12)), nn.Parameter(torch.randn(5))
    before, gradient = matrix.detach().clone(), torch.randn(4, 12)
    optimizer = MuonBeside(torch.optim.SGD([matrix, vector], lr=0.01), {matrix})
    matrix.grad, vector.grad = gradient, torch.ones(5)
    expected_vector = vector.detach() - 0.01
    optimizer.step()
    torch.testing.assert_close(vector.detach(), expected_vector)
    step = (before - matrix.detach()) / (2 * 0.01)
    # Five iterations of Newton and Schulz end near 1, not at it.
    singular_values = torch.linalg.svdvals(step) / (SIZE_OF_ADAMW * 12**0.5)
    assert singular_values.min() > 0.6 and singular_values.max() < 1.3
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    assert torch.cosine_similarity(step.flatten(), (left @ right).flatten(), dim=0) > 0.97


def test_momentum_decay_and_schedule_reach_both_parts():
    """Against a plain loop: a gradient of one entry keeps one singular value, whatever its size."""
    matrix, vector = nn.Parameter(torch.zeros(1, 1)), nn.Parameter(torch.zeros(1))
    optimizer = MuonBeside(torch.optim.SGD([matrix, vector], lr=0.1, weight_decay=0.5), {matrix})
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    expected_vector = expected_matrix = momentum = 0.0
    for step, gradient in enumerate([1.0, -8.0, 0.1]):
        matrix.grad, vector.grad = torch.full((1, 1), gradient), torch.full((1,), gradient)
        optimizer.step()
        schedule.step()
        rate = 0.1 / (1 + step)
        expected_vector -= rate * (gradient + 0.5 * expected_vector)
        momentum = 0.95 * momentum + 0.05 * gradient
        nesterov = 0.95 * momentum + 0.05 * gradient
        expected_matrix *= 1 - 2 * rate * 0.5
        expected_matrix -= 2 * rate * SIZE_OF_ADAMW * (1 if nesterov > 0 else -1)
        assert vector.item() == pytest.approx(expected_vector, rel=1e-5)
        # By up to a third: see above.
        assert matrix.item() == pytest.approx(expected_matrix, rel=0.35)


def test_it_goes_on_where_it_stopped():
    """With momentum, rate and the parameters of both parts."""

    def make():
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))]
        optimizer = MuonBeside(torch.optim.AdamW(parameters, lr=0.1), {parameters[0]})
        return parameters, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    def train(parameters, optimizer, schedule, steps):
        for step in steps:
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()
            schedule.step()

    whole, first, second = make(), make(), make()
    train(*whole, range(6))
    train(*first, range(3))
    with torch.no_grad():
        for parameter, value in zip(second[0], first[0], strict=True):
            parameter.copy_(value)
    for ours, theirs in zip(second[1:], first[1:], strict=True):
        ours.load_state_dict(theirs.state_dict())
    train(*second, range(3, 6))
    for parameter, value in zip(second[0], whole[0], strict=True):
        assert torch.equal(parameter, value)
