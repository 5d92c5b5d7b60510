"""Losses between what the target would say and what the draft says, row by row over the draft vocabulary.

Every loss is a pure function of three tensors, in their dtype:

- `teacher_probabilities` `(rows, draft_vocab_size)`: p, the target's distribution *within* the draft vocabulary, each
  row summing to 1. Not differentiated.
- `out_of_vocabulary_mass` `(rows,)` or `None`: m, the target's probability of all tokens that the draft cannot
  propose; `None` for nothing. In the full vocabulary the target's probabilities are (1 - m) p.
- `logits` `(rows, draft_vocab_size)`: of the draft, whose distribution is q = softmax(logits).

and returns the loss of each row, `(rows,)`. What is accepted in decoding with probability alpha is a draft token drawn
from q (Leviathan et al., arXiv 2211.17192): alpha = sum_v min((1 - m) p_v, q_v) = 1 - TV.
"""

from collections.abc import Callable

import torch


Loss = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor], torch.Tensor]


def soft_cross_entropy(
    teacher_probabilities: torch.Tensor, out_of_vocabulary_mass: torch.Tensor | None, logits: torch.Tensor
) -> torch.Tensor:
    """-sum_v p_v log q_v: EAGLE-3's loss (arXiv 2503.01840). Its gradient is that of `kl`, its value is not."""
    return logits.logsumexp(dim=-1) - (teacher_probabilities * logits).sum(dim=-1)


def kl(
    teacher_probabilities: torch.Tensor, out_of_vocabulary_mass: torch.Tensor | None, logits: torch.Tensor
) -> torch.Tensor:
    """sum_v p_v log(p_v / q_v): ConFu's loss (arXiv 2603.08899). Zero where the draft says what the target would."""
    # p log p is 0 where p is; `xlogy` says so too, several times as slowly.
    log_p = teacher_probabilities.clamp(min=torch.finfo(teacher_probabilities.dtype).tiny).log()
    entropy = -(teacher_probabilities * log_p).sum(dim=-1)
    return soft_cross_entropy(teacher_probabilities, out_of_vocabulary_mass, logits) - entropy


def tv(
    teacher_probabilities: torch.Tensor, out_of_vocabulary_mass: torch.Tensor | None, logits: torch.Tensor
) -> torch.Tensor:
    """1 - alpha, the share of drafted tokens that are refused. Far from the target its gradient all but vanishes."""
    return 1 - acceptance(teacher_probabilities, out_of_vocabulary_mass, logits)


def lk_alpha(
    teacher_probabilities: torch.Tensor, out_of_vocabulary_mass: torch.Tensor | None, logits: torch.Tensor
) -> torch.Tensor:
    """-log alpha (arXiv 2602.23881): aims at acceptance as `tv` does, with a gradient that 1 / alpha keeps alive."""
    return -_log_acceptance(teacher_probabilities, out_of_vocabulary_mass, logits)


def lk_lambda(
    teacher_probabilities: torch.Tensor,
    out_of_vocabulary_mass: torch.Tensor | None,
    logits: torch.Tensor,
    eta: float = 3.0,
) -> torch.Tensor:
    """
    w KL + (1 - w)(1 - alpha) with w = exp(-eta alpha), which takes no gradient (arXiv 2602.23881: eta = 3).

    KL leads while the draft is far from the target, acceptance itself once it is near.
    """
    alpha = acceptance(teacher_probabilities, out_of_vocabulary_mass, logits)
    weight = torch.exp(-eta * alpha.detach())
    return weight * kl(teacher_probabilities, out_of_vocabulary_mass, logits) + (1 - weight) * (1 - alpha)


def acceptance(
    teacher_probabilities: torch.Tensor, out_of_vocabulary_mass: torch.Tensor | None, logits: torch.Tensor
) -> torch.Tensor:
    """alpha: how probable it is that a token drawn from the draft is accepted at temperature 1."""
    return _log_acceptance(teacher_probabilities, out_of_vocabulary_mass, logits).exp()


def _log_acceptance(
    teacher_probabilities: torch.Tensor, out_of_vocabulary_mass: torch.Tensor | None, logits: torch.Tensor
) -> torch.Tensor:
    # In logarithms, where neither a confident draft nor a confident target rounds to nothing.
    log_p = teacher_probabilities.log()
    if out_of_vocabulary_mass is not None:
        # A row of which the draft can say nothing keeps a finite loss (and has no gradient).
        within = (1 - out_of_vocabulary_mass).clamp(min=torch.finfo(logits.dtype).tiny)
        log_p = log_p + within.log()[:, None]
    return torch.minimum(log_p, logits.log_softmax(dim=-1)).logsumexp(dim=-1)


LOSSES: dict[str, Loss] = {
    "kl": kl,
    "soft_cross_entropy": soft_cross_entropy,
    "tv": tv,
    "lk_alpha": lk_alpha,
    "lk_lambda": lk_lambda,
}
