"""The loss of draft rows without ever holding their scores: chunk by chunk, gradients in the same pass as the loss.

A thousand rows over a draft vocabulary of 32,000 are 128 MB in float32, several times over with what autograd keeps.
Here a chunk's scores live in the processor's caches, and what is kept for the backward pass is as large as the rows
and the head.
"""

from typing import Any

import torch
from torch import nn

from .losses import LOSSES


def rows_per_chunk(device: torch.device) -> int:
    """
    Rows whose scores are held at a time: few on a CPU, for its caches; more on an accelerator, for few kernels. With
    exponentials, gradient and what stands between, a score takes up to 26 bytes: 1.6 GiB for 2,048 rows over 32,000
    tokens.
    """
    return 256 if device.type == "cpu" else 2048


# Their gradient by the scores is q - p, which takes a third of the passes over a chunk that autograd would make.
_CROSS_ENTROPIES = ("kl", "soft_cross_entropy")


class ChunkedLoss(torch.autograd.Function):
    r"""
    Weighted sum of a loss over rows.

    Args of `apply`:
        hidden_states (`torch.FloatTensor` of shape `(rows, hidden_size)`): Inputs of the head; cast to the dtype of
            autocast where that is on.
        weight (`torch.FloatTensor` of shape `(draft_vocab_size, hidden_size)`): Of the head.
        teachers (`torch.LongTensor` of shape `(rows,)`): Each row's line in the two following.
        probabilities, out_of_vocabulary_mass, entropies: See [`Teaching`].
        row_weights (`torch.FloatTensor` of shape `(rows,)`).
        loss: Name of one of `LOSSES`.

    Returns:
        The sum, and without gradient each row's first choice (an index into the draft vocabulary) and acceptance
        probability, `(rows,)` each.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        teachers: torch.LongTensor,
        probabilities: torch.Tensor,
        out_of_vocabulary_mass: torch.Tensor,
        entropies: torch.Tensor,
        row_weights: torch.Tensor,
        loss: str,
    ) -> tuple[torch.Tensor, torch.LongTensor, torch.Tensor]:
        device = hidden_states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
        inputs, head = hidden_states.to(dtype), weight.to(dtype)
        needs_inputs, needs_weight = ctx.needs_input_grad[:2]
        input_gradient = torch.empty_like(inputs) if needs_inputs else None
        weight_gradient = torch.zeros_like(weight) if needs_weight else None
        total = torch.zeros((), dtype=probabilities.dtype, device=hidden_states.device)
        choices, acceptances = [], []
        with torch.autocast(device_type=device, enabled=False):
            index = torch.arange(len(inputs), device=inputs.device)
            for rows in index.split(rows_per_chunk(inputs.device)):
                of_chunk, weights = teachers[rows], row_weights[rows]
                p, outside = probabilities[of_chunk], out_of_vocabulary_mass[of_chunk]
                logits = nn.functional.linear(inputs[rows], head).to(p.dtype)  # (chunk, Vd)
                choices.append(logits.max(dim=-1).indices)
                log_q = logits.log_softmax(dim=-1)
                q = log_q.exp()
                acceptances.append(torch.minimum((1 - outside)[:, None] * p, q).sum(dim=-1))
                if loss in _CROSS_ENTROPIES:
                    values = -(p * log_q).sum(dim=-1)
                    if loss == "kl":
                        values = values - entropies[of_chunk]
                    gradient = q.sub_(p).mul_(weights[:, None])
                else:
                    with torch.enable_grad():
                        values = LOSSES[loss](p, outside, logits.requires_grad_())
                        (gradient,) = torch.autograd.grad((values * weights).sum(), logits)
                total += (values.detach() * weights).sum()
                gradient = gradient.to(dtype)
                if input_gradient is not None:
                    input_gradient[rows] = gradient @ head
                if weight_gradient is not None:
                    weight_gradient += gradient.T @ inputs[rows]
        ctx.save_for_backward(input_gradient, weight_gradient)
        ctx.input_dtype = hidden_states.dtype
        choices, acceptances = torch.cat(choices), torch.cat(acceptances)
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
