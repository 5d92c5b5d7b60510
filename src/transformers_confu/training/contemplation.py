"""The stage `contemplation`: soft prompts and `[con]` learn to foresee before the draft learns to read them.

A contemplate row stands where token a + 1 will stand and does not know it. Its own prediction, by the target's head,
is trained to be token a + 2. Without such a start the future channel, whose gradient comes only through a draft that
has no use for it yet, stays where it began.
"""

import torch
from torch import nn

from ..inference.modeling_confu import ConFuDraftModel
from ..inference.target import TargetRunner
from .anchors import Anchors
from .batch import TokenBatch
from .metrics import no_counts
from .objective import Objective, expert_load
from .teacher import contemplate_rows, read_batch


def compute_foresight(draft: ConFuDraftModel, runner: TargetRunner, batch: TokenBatch, anchors: Anchors) -> Objective:
    """
    Cross-entropy of the contemplate rows' predictions, and how often the first choice is right. The counts have one
    step, the token after the next.
    """
    outputs = read_batch(
        runner,
        batch,
        keep_logits=torch.zeros_like(batch.labels, dtype=torch.bool),
        hidden_states=draft.config.target_hidden_state_indices,
        keep_cache=True,
    )
    routed_by, *rest = contemplate_rows(batch, runner.taps(outputs.hidden_states), anchors)
    with torch.autocast(device_type=draft.device.type, enabled=False):
        logits = runner.foresee(outputs.cache, routed_by, *rest)  # (B, K, V)
    counts = anchors.exists
    last = batch.labels.shape[1] - 1
    expected = batch.labels.gather(1, (anchors.positions + 2).clamp(max=last))[counts].to(logits.device)
    logits = logits[counts.to(logits.device)].to(torch.promote_types(logits.dtype, torch.float32))  # (counted, V)
    correct = (logits.detach().max(dim=-1).indices == expected).sum()[None]
    loss_sum = nn.functional.cross_entropy(logits, expected, reduction="sum")
    totals = no_counts(draft.config, num_steps=1) | {
        "loss": loss_sum.detach(),
        "rows": counts.sum(),
        "rows_with_future": counts.sum(),
        "counted": counts.sum()[None],
        "correct": correct,
        "correct_so_far": correct,
        "contemplate_load": expert_load(draft.future_channel.contemplate_token, routed_by[counts]),
    }
    return Objective(loss_sum, totals)
