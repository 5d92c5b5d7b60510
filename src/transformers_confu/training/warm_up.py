"""The contemplation warm-up: soft prompts and `[con]` learn to foresee before the draft learns to read them.

A contemplate row stands where token a + 1 will stand and does not know it. Its own prediction, by the target's head,
is trained to be token a + 2. Without such a start the future channel, whose gradient comes only through a draft that
has no use for it yet, stays where it began.
"""

import torch
from torch import nn

from ..inference.modeling_confu import ConFuDraftModel
from ..inference.target import TargetRunner
from .anchors import Anchors
from .batch import Texts
from .objective import Objective, contemplate_rows, expert_load, nothing_taught
from .teacher import read_texts


POSITIONS = (256, 1024, 4096)
"""Foresight is counted apart for anchors among the first so many tokens of a text, and for those behind."""


def compute_foresight(draft: ConFuDraftModel, runner: TargetRunner, texts: Texts, anchors: Anchors) -> Objective:
    r"""
    Cross-entropy of the contemplate rows' predictions, and how often the first choice is right.

    Arguments as in [`compute_live`]; the counts of the result have one step, the token after the next.
    """
    if not anchors.exists.any():
        return nothing_taught(draft, num_steps=1)
    outputs = read_texts(
        runner,
        texts,
        keep_logits=torch.zeros_like(texts.labels, dtype=torch.bool),
        hidden_states=draft.config.target_hidden_state_indices,
        keep_cache=True,
    )
    routed_by, *rest = contemplate_rows(texts, runner.taps(outputs.hidden_states), anchors)
    with torch.autocast(device_type=draft.device.type, enabled=False):
        logits = runner.foresee(outputs.cache, routed_by, *rest)  # (B, K, V)
    counts = anchors.exists
    last = texts.labels.shape[1] - 1
    expected = texts.labels.gather(1, (anchors.positions + 2).clamp(max=last))[counts].to(logits.device)
    logits = logits[counts.to(logits.device)].to(torch.promote_types(logits.dtype, torch.float32))  # (counted, V)
    is_correct = (logits.detach().max(dim=-1).indices == expected).to(texts.labels.device)
    correct = is_correct.sum()[None]
    positions = texts.position_ids.gather(1, anchors.positions)[counts]
    place = torch.bucketize(positions, torch.tensor(POSITIONS, device=positions.device), right=True)
    return Objective(
        loss_sum=nn.functional.cross_entropy(logits, expected, reduction="sum"),
        counted=counts.sum()[None],
        correct=correct,
        correct_so_far=correct,
        rows=int(counts.sum()),
        rows_with_future=int(counts.sum()),
        contemplate_load=expert_load(draft.future_channel.contemplate_token, routed_by[counts]),
        counted_by_position=place.bincount(minlength=len(POSITIONS) + 1),
        correct_by_position=place[is_correct].bincount(minlength=len(POSITIONS) + 1),
    )
