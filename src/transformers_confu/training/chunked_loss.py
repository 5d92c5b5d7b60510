"""The loss of draft rows without ever holding their scores: chunk by chunk, gradients in the same pass as the loss.

A thousand rows over a draft vocabulary of 32,000 are 128 MB in float32, several times over with what autograd keeps.
Here a chunk's scores live in the processor's caches, and what is kept for the backward pass is as large as the rows
and the head.
"""

from typing import Any

import torch
from torch import nn


def rows_per_chunk(device: torch.device) -> int:
    """
    Rows whose scores are held at a time: few on a CPU, for its caches; more on an accelerator, for few kernels. With
    exponentials, gradient and what stands between, a score takes up to 26 bytes: 1.6 GiB for 2,048 rows over 32,000
    tokens.
    """
    return 256 if device.type == "cpu" else 2048


class ChunkedLoss(torch.autograd.Function):
    r"""
    Weighted sum over rows and steps of the KL divergence from the target's distribution to the draft's.

    Args of `apply`:
        hidden_states (`torch.FloatTensor` of shape `(steps, rows, hidden_size)`): Inputs of the head; cast to the
            dtype of autocast where that is on.
        weight (`torch.FloatTensor` of shape `(draft_vocab_size, hidden_size)`): Of the head.
        teachers (`torch.LongTensor` of shape `(steps, rows)`): Each one's line in the following.
        counts (`torch.BoolTensor` of shape `(steps, rows)`): What counts: of each row its first steps, or none.
        probabilities, out_of_vocabulary_mass, entropies: See [`Teaching`].
        decay (`float`, *optional*): Step s weighs `decay ** s`. Without it see [`survival_weights`].

    Returns:
        The sum, and without gradient each first choice (an index into the draft vocabulary) and acceptance
        probability, `(steps, rows)` each; 0 where nothing counts.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        teachers: torch.LongTensor,
        counts: torch.BoolTensor,
        probabilities: torch.Tensor,
        out_of_vocabulary_mass: torch.Tensor,
        entropies: torch.Tensor,
        decay: float | None,
    ) -> tuple[torch.Tensor, torch.LongTensor, torch.Tensor]:
        device = hidden_states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
        head = weight.to(dtype)
        needs_inputs, needs_weight = ctx.needs_input_grad[:2]
        input_gradient = torch.zeros_like(hidden_states, dtype=dtype) if needs_inputs else None
        weight_gradient = torch.zeros_like(weight) if needs_weight else None
        total = torch.zeros((), dtype=probabilities.dtype, device=hidden_states.device)
        choices, acceptances = torch.zeros_like(teachers), probabilities.new_zeros(teachers.shape)
        num_steps, num_rows = teachers.shape
        size = max(1, rows_per_chunk(hidden_states.device) // num_steps)
        with torch.autocast(device_type=device, enabled=False):
            # Rows with all their steps, so that the weights of the steps are known before their gradients.
            for rows in (slice(first, first + size) for first in range(0, num_rows, size)):
                of_chunk, counted = teachers[:, rows], counts[:, rows]
                of_chunk = of_chunk[counted]  # (chunk,)
                p, outside = probabilities[of_chunk], out_of_vocabulary_mass[of_chunk]
                inputs = hidden_states[:, rows][counted].to(dtype)
                logits = nn.functional.linear(inputs, head).to(p.dtype)  # (chunk, Vd)
                choices[:, rows][counted] = logits.max(dim=-1).indices
                log_q = logits.log_softmax(dim=-1)
                q = log_q.exp()
                acceptances[:, rows][counted] = torch.minimum((1 - outside)[:, None] * p, q).sum(dim=-1)
                if decay is None:
                    weights = survival_weights(acceptances[:, rows], counted)[counted]
                else:
                    weights = decay ** counted.nonzero()[:, 0].to(p.dtype)
                divergences = -(p * log_q).sum(dim=-1) - entropies[of_chunk]
                total += (divergences * weights).sum()
                # By the scores: q - p, which takes a third of the passes over a chunk that autograd would make.
                gradient = q.sub_(p).mul_(weights[:, None]).to(dtype)
                if input_gradient is not None:
                    input_gradient[:, rows][counted] = gradient @ head
                if weight_gradient is not None:
                    weight_gradient += gradient.T @ inputs
        ctx.save_for_backward(input_gradient, weight_gradient)
        ctx.input_dtype = hidden_states.dtype
        ctx.mark_non_differentiable(choices, acceptances)
        return total, choices, acceptances

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        of_inputs, of_weight = ctx.saved_tensors
        if of_inputs is not None:
            of_inputs = of_inputs.to(ctx.input_dtype) * gradient.to(ctx.input_dtype)
        if of_weight is not None:
            of_weight = of_weight * gradient.to(of_weight.dtype)
        return of_inputs, of_weight, None, None, None, None, None, None


def survival_weights(acceptances: torch.Tensor, counts: torch.BoolTensor) -> torch.Tensor:
    r"""
    What each step adds to the expected length of its row's draft: D-PACE (arXiv 2605.18810, equations 7 and 8).

    Step m is reached and accepted with probability a_0 ... a_m. The sum of these over m has the derivative
    sum_{m >= s} a_0 ... a_m by log a_s, which is the weight of step s. Acceptances are moved half-way to 1 before, so
    that later steps learn before earlier ones are right.

    Args:
        acceptances (`torch.FloatTensor` of shape `(steps, rows)`): Probabilities that each token is accepted.
        counts (`torch.BoolTensor` of shape `(steps, rows)`): Steps that there are; the others weigh nothing.
    """
    survival = ((1 + acceptances) / 2 * counts).cumprod(dim=0)
    return survival.flip(0).cumsum(dim=0).flip(0)
