"""Where a training sequence contemplates, and which draft row reads which future prediction.

Decoding yields one f per round: that of the last accepted token a, for the draft row a, and for as many of the tokens
behind it as borrow it. Training mimics this at sampled positions, the anchors (arXiv 2603.08899, "anchor token
sampling" and "future prediction replication").
"""

from dataclasses import dataclass

import torch


IGNORE_INDEX = -100


@dataclass
class Anchors:
    r"""
    Args:
        positions (`torch.LongTensor` of shape `(batch, anchors)`): Token positions a that a contemplate row stands
            behind. Padded; what padding computes is read by no draft row.
        exists (`torch.BoolTensor` of shape `(batch, anchors)`): False on padding.
        routed_by (`torch.LongTensor` of shape `(batch, anchors)`): Position whose taps route the `[con]` of the row.
        of_row (`torch.LongTensor` of shape `(batch, length)`): For each draft row the index of its anchor, or -1.
    """

    positions: torch.LongTensor
    exists: torch.BoolTensor
    routed_by: torch.LongTensor
    of_row: torch.LongTensor


def draft_rows(labels: torch.LongTensor) -> torch.BoolTensor:
    r"""
    The rows that decoding can start a tree from, `(B, T)`.

    Row i holds the feature at i and token i + 1, and predicts token i + 2; both tokens must be answer tokens. The
    first row of an answer is its last prompt token.
    """
    is_answer = labels != IGNORE_INDEX
    rows = torch.zeros_like(is_answer)
    rows[:, :-2] = is_answer[:, 1:-1] & is_answer[:, 2:]
    return rows


def sample_anchors(labels: torch.LongTensor, replication: int, max_lag: int, limit: int | None = None) -> Anchors:
    r"""
    Sample anchors, with PyTorch's global random generator.

    Each run of draft rows is cut into blocks of `replication + 1` rows with one anchor in each, drawn uniformly; its
    first row, the last prompt token, is an anchor besides. An anchor serves itself and the `replication` rows behind
    it unless a nearer anchor does: the rule by which nodes borrow in decoding. About one row in six is left without f
    (the expected gap between uniform draws from neighbouring blocks), which keeps EAGLE-3 mode trained.

    In decoding the `[con]` of a node at depth d is routed by the newest token with a true hidden state, d + 1 before
    it. Here that lag is uniform in 1..`max_lag`, cut at the last prompt token, which itself has lag 0.

    Args:
        labels (`torch.LongTensor` of shape `(batch, length)`): -100 outside of answers.
        replication (`int`): Rows behind an anchor that use its future prediction, l.
        max_lag (`int`): Greatest depth of a drafted node plus 1.
        limit (`int`, *optional*): At most so many anchors in a sequence (K of the paper), the others left out by lot.
            The first row of every answer stays one, also where a sequence has more answers than that.
    """
    rows = draft_rows(labels)
    starts_run = rows.clone()
    starts_run[:, 1:] &= ~rows[:, :-1]
    positions, routed_by = [], []
    for is_row, is_start in zip(rows.cpu(), starts_run.cpu(), strict=True):
        in_text, lagged, is_first = [], [], []
        for start in is_start.nonzero()[:, 0].tolist():
            behind = (~is_row[start:]).nonzero()
            stop = start + int(behind[0]) if len(behind) else len(is_row)
            blocks = torch.arange(start, stop, replication + 1)
            drawn = blocks + torch.randint(replication + 1, blocks.shape)
            anchors = torch.cat([torch.tensor([start]), drawn[drawn < stop]]).unique()
            lag = torch.randint(1, max_lag + 1, anchors.shape)
            in_text.append(anchors)
            lagged.append(torch.maximum(anchors - lag, torch.tensor(start)))
            is_first.append(anchors == start)
        empty = torch.zeros(0, dtype=torch.long)
        anchors = torch.cat(in_text) if in_text else empty
        keep = torch.arange(len(anchors))
        if limit is not None and len(anchors) > limit:
            first = torch.cat(is_first)
            # First rows lead, the others follow in an order drawn by lot.
            order = (torch.rand(len(anchors)) - first.float()).argsort()
            keep = order[: max(limit, int(first.sum()))].sort().values
        positions.append(anchors[keep])
        routed_by.append(torch.cat(lagged)[keep] if lagged else empty)

    return place_anchors(positions, routed_by, labels, replication)


def place_anchors(
    positions: list[torch.LongTensor], routed_by: list[torch.LongTensor], labels: torch.LongTensor, replication: int
) -> Anchors:
    """Anchors of a batch from those of each sequence, rising; `labels` `(batch, length)` and the rest as above."""
    rows = draft_rows(labels)
    index = torch.arange(rows.shape[1])
    # The nearest anchor at or before a row: the running maximum of anchor numbers.
    of_row = torch.full(rows.shape, -1, dtype=torch.long)
    for number, anchors in enumerate(positions):
        of_row[number, anchors] = torch.arange(len(anchors))
        of_row[number] = of_row[number].cummax(dim=0).values
        if len(anchors):
            too_far = index - anchors[of_row[number].clamp(min=0)] > replication
            of_row[number, too_far] = -1
    pad = torch.nn.utils.rnn.pad_sequence
    return Anchors(
        positions=pad(positions, batch_first=True).to(labels.device),
        exists=pad([torch.ones_like(anchors, dtype=torch.bool) for anchors in positions], batch_first=True).to(
            labels.device
        ),
        routed_by=pad(routed_by, batch_first=True).to(labels.device),
        of_row=of_row.to(labels.device).masked_fill(~rows, -1),
    )
