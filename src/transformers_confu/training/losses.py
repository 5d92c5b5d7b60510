"""Losses between what the target would say and what the draft says, row by row over the draft vocabulary.

Every loss is a pure function of three tensors, in their dtype:

- `p` `(rows, draft_vocab_size)`: the target's distribution *within* the draft vocabulary, each row summing to 1. Not
  differentiated.
- `outside` `(rows,)`: the target's probability of all tokens that the draft cannot propose. In the full vocabulary the
  target's probabilities are (1 - outside) p.
- `logits` `(rows, draft_vocab_size)`: of the draft, whose distribution is q = softmax(logits).

and returns the loss of each row, `(rows,)`. What is accepted in decoding with probability alpha is a draft token drawn
from q (Leviathan et al., arXiv 2211.17192): alpha = sum_v min((1 - outside) p_v, q_v) = 1 - TV.
"""

from collections.abc import Callable

import torch


Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def soft_cross_entropy(p: torch.Tensor, outside: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """-sum_v p_v log q_v: EAGLE-3's loss (arXiv 2503.01840). Its gradient is that of `kl`, its value is not."""
    return logits.logsumexp(dim=-1) - (p * logits).sum(dim=-1)


def kl(p: torch.Tensor, outside: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """sum_v p_v log(p_v / q_v): ConFu's loss (arXiv 2603.08899). Zero where the draft says what the target would."""
    return soft_cross_entropy(p, outside, logits) + torch.xlogy(p, p).sum(dim=-1)


def tv(p: torch.Tensor, outside: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """1 - alpha, the share of drafted tokens that are refused. Far from the target its gradient all but vanishes."""
    return 1 - acceptance(p, outside, logits)


def lk_alpha(p: torch.Tensor, outside: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """-log alpha (arXiv 2602.23881): aims at acceptance as `tv` does, with a gradient that 1 / alpha keeps alive."""
    return -_log_acceptance(p, outside, logits)


def lk_lambda(p: torch.Tensor, outside: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """
    w KL + (1 - w)(1 - alpha) with w = exp(-3 alpha), which takes no gradient (arXiv 2602.23881).

    KL leads while the draft is far from the target, acceptance itself once it is near.
    """
    alpha = acceptance(p, outside, logits)
    weight = torch.exp(-3 * alpha.detach())
    return weight * kl(p, outside, logits) + (1 - weight) * (1 - alpha)


def acceptance(p: torch.Tensor, outside: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """alpha: how probable it is that a token drawn from the draft is accepted at temperature 1."""
    return _log_acceptance(p, outside, logits).exp()


def _log_acceptance(p: torch.Tensor, outside: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    # In logarithms, where neither a confident draft nor a confident target rounds to nothing. A row of which the draft
    # can say nothing keeps a finite loss (and has no gradient).
    within = (1 - outside).clamp(min=torch.finfo(logits.dtype).tiny)
    log_p = p.log() + within.log()[:, None]
    return torch.minimum(log_p, logits.log_softmax(dim=-1)).logsumexp(dim=-1)


LOSSES: dict[str, Loss] = {
    "kl": kl,
    "soft_cross_entropy": soft_cross_entropy,
    "tv": tv,
    "lk_alpha": lk_alpha,
    "lk_lambda": lk_lambda,
}
