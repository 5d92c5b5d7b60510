"""The contemplation warm-up: soft prompts and `[con]` learn to foresee before the draft learns to read them.

A contemplate row stands where token a + 1 will stand and does not know it. Its own prediction, by the target's head,
is trained to be token a + 2. Without such a start the future channel, whose gradient comes only through a draft that
has no use for it yet, stays where it began.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from ..modeling_confu import ConFuDraftModel
from ..target_runner import TargetRunner
from .anchors import Anchors
from .objective import Objective, expert_load, gather_rows, target_forward


def compute_foresight(
    draft: ConFuDraftModel,
    target: PreTrainedModel,
    input_ids: torch.LongTensor,
    attention_mask: torch.LongTensor,
    labels: torch.LongTensor,
    anchors: Anchors,
) -> Objective:
    r"""
    Cross-entropy of the contemplate rows' predictions, and how often the first choice is right.

    Arguments as in [`compute_objective`]; the counts of the result have one step, the token after the next.
    """
    runner = TargetRunner(target, draft.config, draft.future_channel)
    no_logits = torch.zeros_like(labels, dtype=torch.bool)
    taps, _, cache = target_forward(runner, input_ids, attention_mask, no_logits, keep_cache=True)
    routed_by = gather_rows(taps, anchors.routed_by)
    length = input_ids.shape[1]
    position_ids = torch.arange(length, device=input_ids.device).expand_as(input_ids)
    sees_prefix = (position_ids[:, None] <= anchors.positions[..., None]) & attention_mask.bool()[:, None]
    with torch.autocast(device_type=draft.device.type, enabled=False):
        logits = runner.foresee(cache, routed_by, anchors.positions + 1, sees_prefix)  # (B, K, V)
    counts = anchors.exists
    expected = labels.gather(1, (anchors.positions + 2).clamp(max=length - 1))[counts].to(logits.device)
    logits = logits[counts.to(logits.device)].to(torch.promote_types(logits.dtype, torch.float32))  # (counted, V)
    correct = (logits.detach().max(dim=-1).indices == expected).sum()[None].to(labels.device)
    return Objective(
        loss_sum=nn.functional.cross_entropy(logits, expected, reduction="sum"),
        counted=counts.sum()[None],
        correct=correct,
        correct_so_far=correct,
        rows=int(counts.sum()),
        rows_with_future=int(counts.sum()),
        contemplate_load=expert_load(draft.future_channel.contemplate_token, routed_by[counts]),
    )
