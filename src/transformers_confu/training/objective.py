"""What one batch teaches the draft: contemplation at the anchors, the unrolled draft, the loss."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import DynamicCache

from ..inference.modeling_confu import ConFuDraftModel, ConFuExpertMixture
from ..inference.target import TargetRunner
from .anchors import Anchors
from .batch import TokenBatch, gather_rows, padded_index
from .chunked_loss import ChunkedLoss
from .metrics import Counts, no_counts
from .replay import follow_guesses, rounds, spread
from .teacher import Teaching, read_batch, teach
from .unroll import unroll


@dataclass
class Objective:
    """Loss of one batch, a scalar: the sum over rows and, weighted, over steps. And [`~metrics.Counts`]."""

    loss_sum: torch.Tensor
    counts: Counts
    foresight: Counts | None = None  # `counted`, `correct` `(ordered rows,)`
    refused: torch.BoolTensor | None = None  # (B, T): roots of rounds that ended in a refused guess


@dataclass
class Recipe:
    """How a draft is trained, beside its data."""

    num_steps: int  # of TTT
    decay: float | None  # step s weighs decay ** s; None: see `survival_weights`
    loss: str = "kl"  # one of `LOSSES`
    foresight: float = 0.0  # weight of the contemplate rows' own predictions in the loss
    on_policy: str | None = None  # see `replay.py`
    replayed: int = 128  # rows of a batch at most


def compute_live(
    draft: ConFuDraftModel, runner: TargetRunner, batch: TokenBatch, anchors: Anchors | None, recipe: Recipe
) -> Objective:
    r"""
    The objective of a batch that the target reads now.

    Gradients pass through the target to soft prompts and `[con]`, from the contemplate rows only.

    Args:
        runner: Of the frozen target, in its own dtype.
        anchors: Where the batch contemplates. Without them the draft trains in EAGLE-3 mode.
    """
    outputs = read_batch(
        runner,
        batch,
        keep_logits=batch.teaching_positions,
        hidden_states=draft.config.target_hidden_state_indices,
        keep_cache=anchors is not None or recipe.on_policy == "guesses",
    )
    teaching = teach(draft, runner.taps(outputs.hidden_states), outputs.logits)
    futures = None if anchors is None else contemplate(runner, batch, teaching.taps, outputs.cache, anchors)
    objective = compute_objective(draft, runner.embed, batch, teaching, anchors, futures, recipe)
    if anchors is not None and (recipe.foresight or not torch.is_grad_enabled()):
        loss, objective.foresight = foresee(draft, runner, batch, teaching, anchors, futures)
        objective.loss_sum = objective.loss_sum + recipe.foresight * loss
    if recipe.on_policy == "guesses" and torch.is_grad_enabled():
        roots = spread(objective.refused, recipe.replayed)
        if roots.any():
            hidden_states, teachers, counts, teaching = follow_guesses(
                draft, runner, batch, teaching, outputs.cache, roots, recipe.num_steps
            )
            loss, _, _ = draft_loss(draft, hidden_states, teachers, counts, teaching, recipe)
            objective.loss_sum = objective.loss_sum + loss
    return objective


def draft_loss(
    draft: ConFuDraftModel,
    hidden_states: torch.Tensor,
    teachers: torch.LongTensor,
    counts: torch.BoolTensor,
    teaching: Teaching,
    recipe: Recipe,
) -> tuple[torch.Tensor, ...]:
    """[`ChunkedLoss`] of outputs of the layer, all steps at once: the head has one gradient to keep then."""
    # `ChunkedLoss` makes gradients in its forward; an evaluation has no use for the head's.
    head = draft.lm_head.weight if torch.is_grad_enabled() else draft.lm_head.weight.detach()
    return ChunkedLoss.apply(
        draft.head_down(draft.norm(hidden_states)),
        head,
        teachers,
        counts,
        teaching.probabilities,
        teaching.out_of_vocabulary_mass,
        teaching.entropies,
        recipe.decay,
        recipe.loss,
    )


def foresee(
    draft: ConFuDraftModel,
    runner: TargetRunner,
    batch: TokenBatch,
    teaching: Teaching,
    anchors: Anchors,
    futures: torch.Tensor,
) -> tuple[torch.Tensor, Counts]:
    """KL divergence from what the target says later to what each contemplate row says now; how often both agree."""
    ordered, size = draft.config.num_contemplate_rows, draft.config.target_hidden_size
    final_states = futures.unflatten(-1, (ordered, -1))[..., -size:].flatten(0, 1).transpose(0, 1)  # (k, B * K, Ht)
    taught_by = anchors.positions[..., None] + 1 + torch.arange(ordered, device=futures.device)
    last = batch.labels.shape[1] - 1
    teachers = batch.teacher_numbers.gather(1, taught_by.clamp(max=last).flatten(1)).view_as(taught_by)
    counts = (anchors.exists[..., None] & (teachers >= 0) & (taught_by <= last)).cumprod(dim=-1).bool()
    teachers, counts = (states.flatten(0, 1).T.contiguous() for states in (teachers, counts))
    head = runner.target.get_output_embeddings().weight[draft.draft_token_ids].float()
    loss_sum, choices, _ = ChunkedLoss.apply(
        final_states,
        head,
        teachers,
        counts,
        teaching.probabilities,
        teaching.out_of_vocabulary_mass,
        teaching.entropies,
        1.0,
        "kl",
    )
    correct = counts & (draft.draft_token_ids[choices] == teaching.best_tokens[teachers])
    return loss_sum, {"counted": counts.sum(dim=1), "correct": correct.sum(dim=1)}


def contemplate(
    runner: TargetRunner, batch: TokenBatch, taps: torch.Tensor, cache: DynamicCache, anchors: Anchors
) -> torch.Tensor:
    """Future predictions at the anchors `(B, K, F)`, behind texts that are cached."""
    with torch.autocast(device_type=taps.device.type, enabled=False):
        return runner.contemplate(cache, *contemplate_rows(batch, taps, anchors))


def contemplate_rows(batch: TokenBatch, taps: torch.Tensor, anchors: Anchors) -> tuple[torch.Tensor, ...]:
    """What [`TargetRunner`] asks about the contemplate rows at anchors, behind a cache that holds the batch."""
    return (
        gather_rows(taps, anchors.routed_by),
        batch.position_ids.gather(1, anchors.positions) + 1,
        batch.position_ids.gather(1, anchors.routed_by) + 1,
        batch.sees(anchors.positions),
    )


def compute_objective(
    draft: ConFuDraftModel,
    embed: nn.Module,
    batch: TokenBatch,
    teaching: Teaching,
    anchors: Anchors | None,
    futures: torch.Tensor | None,
    recipe: Recipe,
) -> Objective:
    r"""
    The objective of a batch about which the target has spoken; arguments as of [`compute_live`], and:

    Args:
        embed: The target's input embeddings, for a draft that has none of its own.
        futures (`torch.FloatTensor` of shape `(batch, anchors, future_size)`, *optional*): What comes of contemplation
            at the anchors.
    """
    rows, row_exists = padded_index(batch.draft_rows)  # (B, R)

    features = draft.fuse_taps(teaching.taps)  # (B, T, H)
    future_states = has_future = borrowed = None
    totals = no_counts(draft.config, recipe.num_steps) | {"rows": row_exists.sum()}
    if anchors is not None:
        anchor_of_row = anchors.of_row.gather(1, rows)
        has_future = (anchor_of_row >= 0) & row_exists
        future_states = gather_rows(futures, anchor_of_row.clamp(min=0))  # (B, R, F)
        borrowed = rows - anchors.positions.gather(1, anchor_of_row.clamp(min=0))
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
    steps = unroll(
        draft,
        inputs_embeds,
        features,
        batch.position_ids,
        sees=batch.sees(rows),
        rows=rows,
        future_states=future_states,
        has_future=has_future,
        num_steps=recipe.num_steps,
        borrowed=borrowed,
    )

    hidden_states = torch.stack(list(steps)).flatten(1, 2)  # (S, B * R, H)

    # Row i at step s is taught by position i + 1 + s. It counts while all tokens up to i + 2 + s are of one answer.
    taught_by = rows + 1 + torch.arange(recipe.num_steps, device=rows.device)[:, None, None]  # (S, B, R)
    length = batch.input_ids.shape[1]
    teachers = batch.teacher_numbers.expand(recipe.num_steps, -1, -1).gather(2, taught_by.clamp(max=length - 1))
    counts = (row_exists & (teachers >= 0) & (taught_by < length)).cumprod(dim=0).bool().flatten(1)
    teachers = teachers.flatten(1)
    loss_sum, choices, acceptances = draft_loss(draft, hidden_states, teachers, counts, teaching, recipe)
    refused = None
    if recipe.on_policy is not None:
        shape = (recipe.num_steps, *rows.shape)
        said = batch.input_ids.expand(recipe.num_steps, -1, -1).gather(2, (taught_by + 1).clamp(max=length - 1))
        right = counts.view(shape) & (draft.draft_token_ids[choices].view(shape) == said)
        is_root, accepted = rounds(rows, row_exists, right)
        reached = counts.view(shape) & is_root & (torch.arange(recipe.num_steps)[:, None, None] <= accepted)
        refused = torch.zeros_like(batch.draft_rows).scatter(1, rows, (reached & ~right).any(dim=0) & row_exists)
        if recipe.on_policy == "roots" and torch.is_grad_enabled():
            # Only what decoding comes to, on average as much as all rows.
            loss_sum, _, _ = draft_loss(draft, hidden_states, teachers, reached.flatten(1), teaching, recipe)
            loss_sum = loss_sum * row_exists.sum() / is_root.sum().clamp(min=1)
    is_correct = counts & (draft.draft_token_ids[choices] == teaching.best_tokens[teachers])
    totals |= {
        "loss": loss_sum.detach(),
        "counted": counts.sum(dim=1),
        "correct": is_correct.sum(dim=1),
        "correct_so_far": is_correct.cumprod(dim=0).sum(dim=1),
        "accepted_so_far": acceptances.cumprod(dim=0).sum(dim=1),
    }
    return Objective(loss_sum, totals, refused=refused)


@torch.no_grad()
def expert_load(mixture: ConFuExpertMixture, hidden_states: torch.Tensor) -> torch.LongTensor:
    """How often each expert is chosen for inputs `(rows, input_size)`; `(experts,)`."""
    _, chosen = mixture.route(hidden_states)
    return chosen.flatten().bincount(minlength=mixture.experts.shape[0])
