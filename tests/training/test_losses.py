"""Losses against loops over plain numbers and closed forms, in float64."""

import math

import pytest
import torch

from transformers_confu.training.losses import LOSSES, acceptance


def make_case(rows: int = 5, vocabulary: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    p = (2 * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)).softmax(dim=-1)
    p[0] = torch.eye(vocabulary, dtype=torch.float64)[2]  # a target that is sure: p log p at p = 0
    out_of_vocabulary = 0.6 * torch.rand(rows, generator=generator, dtype=torch.float64)
    return p, out_of_vocabulary, 2 * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)


def by_hand(name: str, p: list[float], mass: float, logits: list[float]) -> float:
    total = sum(math.exp(logit) for logit in logits)
    q = [math.exp(logit) / total for logit in logits]
    alpha = sum(min((1 - mass) * a, b) for a, b in zip(p, q, strict=True))
    kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
    weight = math.exp(-3 * alpha)
    return {
        "kl": kl,
        "soft_cross_entropy": -sum(a * math.log(b) for a, b in zip(p, q, strict=True)),
        "tv": 1 - alpha,
        "lk_alpha": -math.log(alpha),
        "lk_lambda": weight * kl + (1 - weight) * (1 - alpha),
    }[name]


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_equals_a_loop_over_rows(name):
    case = make_case()
    expected = [by_hand(name, *row) for row in zip(*(part.tolist() for part in case), strict=True)]
    torch.testing.assert_close(LOSSES[name](*case), torch.tensor(expected, dtype=torch.float64))


def test_the_weight_between_kl_and_acceptance_takes_no_gradient():
    p, out_of_vocabulary, logits = make_case()
    logits.requires_grad_()
    weight = torch.exp(-3 * acceptance(p, out_of_vocabulary, logits)).detach()
    kl, tv = (LOSSES[name](p, out_of_vocabulary, logits) for name in ("kl", "tv"))
    ours, theirs = (
        torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0]
        for loss in (LOSSES["lk_lambda"](p, out_of_vocabulary, logits), weight * kl + (1 - weight) * tv)
    )
    torch.testing.assert_close(ours, theirs)


def test_a_perfect_draft_loses_nothing_but_what_it_cannot_say():
    p, out_of_vocabulary, _ = (part[1:] for part in make_case())
    nothing = torch.zeros_like(out_of_vocabulary)
    for name in ("kl", "tv", "lk_alpha", "lk_lambda"):
        torch.testing.assert_close(LOSSES[name](p, nothing, p.log()), nothing, rtol=0, atol=1e-12)
    # A miss is all that lies outside of the draft vocabulary.
    torch.testing.assert_close(LOSSES["tv"](p, out_of_vocabulary, p.log()), out_of_vocabulary)


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_rows_stay_finite_in_float32(name):
    # Drafts and targets that are sure, of the same token and of different ones; a row that is out of the vocabulary.
    p = torch.eye(3)[[0, 0, 1]]
    out_of_vocabulary = torch.tensor([0.0, 0.0, 1.0])
    logits = torch.tensor([[80.0, 0, -80], [0, 80.0, -80], [0, 0, 0]], requires_grad=True)
    loss = LOSSES[name](p, out_of_vocabulary, logits)
    loss.sum().backward()
    assert loss.isfinite().all() and logits.grad.isfinite().all()
