"""What one batch teaches: the target's forward, contemplation at the anchors, the unrolled draft, the loss."""

from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel

from ..modeling_confu import ConFuDraftModel, ConFuExpertMixture
from ..target_runner import TargetRunner
from .anchors import Anchors, draft_rows
from .unroll import unroll


@dataclass
class Objective:
    r"""
    Loss and counts of one batch. Sums, not means, so that batches add up.

    Args:
        loss_sum (`torch.FloatTensor`, scalar): KL(target || draft) over the draft vocabulary, summed over rows and,
            weighted, over steps.
        counted (`torch.LongTensor` of shape `(steps,)`): Rows that have a target at each step.
        correct (`torch.LongTensor` of shape `(steps,)`): Rows where the draft's first choice is the target's. A target
            outside the draft vocabulary is a miss.
        correct_so_far (`torch.LongTensor` of shape `(steps,)`): Rows that are right at this step and all before.
        rows, rows_with_future (`int`): Draft rows, and how many read a future prediction.
        contemplate_load, future_load (`torch.LongTensor` of shape `(experts,)`, *optional*): How often the router of
            `[con]`, and that of `[f]`, chose each expert.
    """

    loss_sum: torch.Tensor
    counted: torch.LongTensor
    correct: torch.LongTensor
    correct_so_far: torch.LongTensor
    rows: int
    rows_with_future: int
    contemplate_load: torch.LongTensor | None = None
    future_load: torch.LongTensor | None = None


def compute_objective(
    draft: ConFuDraftModel,
    target: PreTrainedModel,
    input_ids: torch.LongTensor,
    attention_mask: torch.LongTensor,
    labels: torch.LongTensor,
    anchors: Anchors | None,
    num_steps: int,
    decay: float,
    weight_without_future: float = 1.0,
) -> Objective:
    r"""
    Args:
        draft ([`ConFuDraftModel`]): Trained.
        target ([`PreTrainedModel`]): Frozen; runs in its own dtype. Gradients pass through it to soft prompts and
            `[con]`, from the contemplate rows only.
        input_ids, attention_mask, labels (`torch.LongTensor` of shape `(batch, length)`): Right-padded; labels are
            -100 outside of answers.
        anchors ([`Anchors`], *optional*): Without them the draft trains in EAGLE-3 mode.
        num_steps (`int`), decay (`float`): TTT steps, and the weight of step s as `decay ** s`.
        weight_without_future (`float`): Weight of the rows that no anchor serves.
    """
    runner = TargetRunner(target, draft.config, draft.future_channel)
    is_row = draft_rows(labels)
    if not is_row.any():
        nothing = torch.zeros(num_steps, dtype=torch.long, device=labels.device)
        zero = sum(parameter.sum() * 0.0 for parameter in draft.parameters() if parameter.requires_grad)
        return Objective(zero, nothing, nothing, nothing, rows=0, rows_with_future=0)
    rows, row_exists = _padded_index(is_row)  # (B, R)

    # Position j of the target says what token j + 1 should be. Row i at step s is taught by j = i + 1 + s.
    is_teacher = torch.zeros_like(is_row)
    is_teacher[:, 1:] = is_row[:, :-1]
    taps, teacher_logits, cache = target_forward(runner, input_ids, attention_mask, is_teacher, anchors is not None)
    token_ids = draft.draft_token_ids.to(teacher_logits.device)
    # `max` and not `argmax`, which is three times slower in bfloat16 on a CPU.
    best_tokens = teacher_logits.max(dim=-1).indices.to(labels.device)  # (teachers,), over the full vocabulary
    dtype = torch.promote_types(draft.dtype, torch.float32)  # of the loss
    teacher_logits = teacher_logits[:, token_ids].to(draft.device, dtype)  # (teachers, Vd)
    teacher_probabilities = teacher_logits.softmax(dim=-1)
    # The part of KL that does not depend on the draft.
    teacher_entropies = torch.logsumexp(teacher_logits, dim=-1) - (teacher_probabilities * teacher_logits).sum(dim=-1)
    teacher_of = torch.full_like(labels, -1).masked_scatter(
        is_teacher, torch.arange(len(best_tokens), device=labels.device)
    )

    length = input_ids.shape[1]
    position_ids = torch.arange(length, device=input_ids.device).expand_as(input_ids)
    real = attention_mask.bool()
    future_states = has_future = None
    row_weights = torch.ones(rows.shape, device=draft.device, dtype=dtype)
    load = {}
    if anchors is not None:
        sees_prefix = (position_ids[:, None] <= anchors.positions[..., None]) & real[:, None]  # (B, K, T)
        with torch.autocast(device_type=draft.device.type, enabled=False):
            at_anchors = runner.contemplate(
                cache, gather_rows(taps, anchors.routed_by), anchors.positions + 1, sees_prefix
            )  # (B, K, F)
        anchor_of_row = anchors.of_row.gather(1, rows)
        has_future = (anchor_of_row >= 0) & row_exists
        future_states = gather_rows(at_anchors, anchor_of_row.clamp(min=0))  # (B, R, F)
        row_weights = row_weights.masked_fill(~has_future.to(draft.device), weight_without_future)
        load = {
            "contemplate_load": expert_load(
                draft.future_channel.contemplate_token, gather_rows(taps, anchors.routed_by)[anchors.exists]
            ),
            "future_load": expert_load(
                draft.future_channel.future_token, draft.fuse_taps(gather_rows(taps, rows)[has_future])
            ),
        }

    embed = draft.embed_tokens or target.get_input_embeddings()
    with torch.no_grad() if draft.embed_tokens is None else torch.enable_grad():
        inputs_embeds = embed(input_ids).to(draft.device, draft.dtype)
    steps = unroll(
        draft,
        inputs_embeds,
        taps,
        position_ids,
        sees=(position_ids[:, None] <= rows[..., None]) & real[:, None],
        rows=rows,
        future_states=future_states,
        has_future=has_future,
        num_steps=num_steps,
    )

    loss_sum = torch.zeros((), device=draft.device, dtype=dtype)
    counted, correct, correct_so_far = [], [], []
    # A row counts at step s while all tokens up to i + 2 + s belong to the same answer.
    counts = row_exists
    all_correct = row_exists
    for step, features in enumerate(steps):
        teacher = teacher_of.gather(1, (rows + 1 + step).clamp(max=length - 1))
        counts = counts & (teacher >= 0) & (rows + 1 + step < length)
        index = teacher[counts]
        logits = draft.lm_head(draft.norm(features[counts])).to(dtype)  # (counted, Vd)
        cross_entropies = torch.logsumexp(logits, dim=-1) - (teacher_probabilities[index] * logits).sum(dim=-1)
        loss_sum = loss_sum + decay**step * (row_weights[counts] * (cross_entropies - teacher_entropies[index])).sum()
        is_correct = torch.zeros_like(counts)
        is_correct[counts] = token_ids.to(logits.device)[logits.detach().argmax(dim=-1)] == best_tokens[index]
        all_correct = all_correct & is_correct
        counted.append(counts.sum())
        correct.append(is_correct.sum())
        correct_so_far.append(all_correct.sum())
    return Objective(
        loss_sum=loss_sum,
        counted=torch.stack(counted),
        correct=torch.stack(correct),
        correct_so_far=torch.stack(correct_so_far),
        rows=int(row_exists.sum()),
        rows_with_future=0 if has_future is None else int(has_future.sum()),
        **load,
    )


@torch.no_grad()
def expert_load(mixture: ConFuExpertMixture, hidden_states: torch.Tensor) -> torch.LongTensor:
    """How often each expert is chosen for inputs `(rows, input_size)`; `(experts,)`."""
    _, chosen = mixture.route(hidden_states)
    return chosen.flatten().bincount(minlength=mixture.experts.shape[0])


@torch.no_grad()
def target_forward(
    runner: TargetRunner,
    input_ids: torch.LongTensor,
    attention_mask: torch.LongTensor,
    is_teacher: torch.BoolTensor,
    keep_cache: bool,
) -> tuple[torch.Tensor, torch.Tensor, DynamicCache | None]:
    """Taps `(B, T, taps_size)`, logits of the teaching positions `(teachers, V)`, and the cache if asked for."""
    target = runner.target
    cache = DynamicCache(config=target.config) if keep_cache else None
    keeps_logits = target._supports_logits_to_keep()
    with torch.autocast(device_type=target.device.type, enabled=False):
        outputs = target(
            input_ids=input_ids,
            # Padding is on the right, where no real row sees it, and causal masking alone is cheaper.
            attention_mask=None if bool(attention_mask.all()) else attention_mask,
            cache=cache,
            use_cache=keep_cache,
            output_hidden_states=runner.config.target_hidden_state_indices,
            **({"logits_to_keep": is_teacher} if keeps_logits else {}),
        )
    logits = outputs.logits if keeps_logits else outputs.logits[is_teacher.to(outputs.logits.device)]
    return runner.taps(outputs.hidden_states), logits, cache


def _padded_index(mask: torch.BoolTensor) -> tuple[torch.LongTensor, torch.BoolTensor]:
    """True columns of each row of `(B, T)`, padded to the longest: index `(B, R)`, and which entries are real."""
    order = mask.int().sort(dim=1, descending=True, stable=True)
    most = int(mask.sum(dim=1).max())
    return order.indices[:, :most], order.values[:, :most].bool()


def gather_rows(states: torch.Tensor, index: torch.LongTensor) -> torch.Tensor:
    """Rows `index` `(B, R)` of `states` `(B, T, D)`."""
    return states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))


__all__ = ["Objective", "compute_objective", "gather_rows", "target_forward"]
