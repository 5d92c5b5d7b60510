"""What one batch teaches the draft: the unrolled draft, its loss, and what is counted on the way."""

from dataclasses import dataclass

import torch
from torch import nn

from ..inference.modeling_confu import ConFuDraftModel, ConFuExpertMixture
from .anchors import Anchors
from .batch import TokenBatch, gather_rows
from .chunked_loss import ChunkedLoss
from .metrics import Counts, no_counts
from .teacher import Teaching
from .unroll import unroll


@dataclass
class Objective:
    """Loss of one batch, a scalar: the sum over rows and, weighted, over steps. And [`~metrics.Counts`]."""

    loss_sum: torch.Tensor
    counts: Counts


def compute_objective(
    draft: ConFuDraftModel,
    embed: nn.Module,
    batch: TokenBatch,
    teaching: Teaching,
    anchors: Anchors | None,
    num_steps: int,
    decay: float | None,
) -> Objective:
    r"""
    The objective of a batch about which the target has spoken.

    Args:
        embed: The target's input embeddings, for a draft that has none of its own.
        anchors: Where the batch contemplates. Without them the draft trains in EAGLE-3 mode.
        num_steps: Of TTT.
        decay: See [`ChunkedLoss`].
    """
    rows, row_exists = _padded_index(batch.draft_rows)  # (B, R)

    features = draft.fuse_taps(teaching.taps)  # (B, T, H)
    future_states = has_future = None
    totals = no_counts(draft.config, num_steps) | {"rows": row_exists.sum()}
    if anchors is not None:
        anchor_of_row = anchors.of_row.gather(1, rows)
        has_future = (anchor_of_row >= 0) & row_exists
        future_states = gather_rows(teaching.futures, anchor_of_row.clamp(min=0))  # (B, R, F)
        totals |= {
            "rows_with_future": has_future.sum(),
            "contemplate_load": expert_load(
                draft.future_channel.contemplate_token, gather_rows(teaching.taps, anchors.routed_by)[anchors.exists]
            ),
            "future_load": expert_load(
                draft.future_channel.future_token, gather_rows(features.detach(), rows)[has_future]
            ),
        }

    embed = draft.embed_tokens or embed
    with torch.no_grad() if draft.embed_tokens is None else torch.enable_grad():
        inputs_embeds = embed(batch.input_ids).to(draft.device, draft.dtype)
    of_rows = (batch.sees(rows), rows, future_states, has_future)
    steps = unroll(draft, inputs_embeds, features, batch.position_ids, *of_rows, num_steps)
    hidden_states = torch.stack(list(steps)).flatten(1, 2)  # (S, B * R, H)

    # Row i at step s is taught by position i + 1 + s. It counts while all tokens up to i + 2 + s are of one answer.
    taught_by = rows + 1 + torch.arange(num_steps, device=rows.device)[:, None, None]  # (S, B, R)
    length = batch.input_ids.shape[1]
    teachers = batch.teacher_numbers.expand(num_steps, -1, -1).gather(2, taught_by.clamp(max=length - 1))
    counts = (row_exists & (teachers >= 0) & (taught_by < length)).cumprod(dim=0).bool().flatten(1)
    teachers = teachers.flatten(1)
    # `ChunkedLoss` makes gradients in its forward; an evaluation has no use for the head's.
    head = draft.lm_head.weight if torch.is_grad_enabled() else draft.lm_head.weight.detach()
    # All steps at once, so that the head has one gradient to keep, not one for each.
    loss_sum, choices, acceptances = ChunkedLoss.apply(
        draft.norm(hidden_states),
        head,
        teachers,
        counts,
        teaching.probabilities,
        teaching.out_of_vocabulary_mass,
        teaching.entropies,
        decay,
    )
    is_correct = counts & (draft.draft_token_ids[choices] == teaching.best_tokens[teachers])
    totals |= {
        "loss": loss_sum.detach(),
        "counted": counts.sum(dim=1),
        "correct": is_correct.sum(dim=1),
        "correct_so_far": is_correct.cumprod(dim=0).sum(dim=1),
        "accepted_so_far": acceptances.cumprod(dim=0).sum(dim=1),
    }
    return Objective(loss_sum, totals)


@torch.no_grad()
def expert_load(mixture: ConFuExpertMixture, hidden_states: torch.Tensor) -> torch.LongTensor:
    """How often each expert is chosen for inputs `(rows, input_size)`; `(experts,)`."""
    _, chosen = mixture.route(hidden_states)
    return chosen.flatten().bincount(minlength=mixture.experts.shape[0])


def _padded_index(mask: torch.BoolTensor) -> tuple[torch.LongTensor, torch.BoolTensor]:
    """True columns of each row of `(B, T)`, padded to the longest: index `(B, R)`, and which entries are real."""
    order = mask.int().sort(dim=1, descending=True, stable=True)
    most = int(mask.sum(dim=1).max())
    return order.indices[:, :most], order.values[:, :most].bool()
