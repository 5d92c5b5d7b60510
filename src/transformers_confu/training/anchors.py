"""Where a training sequence contemplates, and which draft row reads which future prediction.

Decoding yields one f per round: that of the last accepted token a, for the draft row a, and for as many of the tokens
behind it as borrow it. Training mimics this at sampled positions, the anchors (arXiv 2603.08899, "anchor token
sampling" and "future prediction replication").
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .batch import draft_rows


@dataclass
class Anchors:
    """The anchors of a batch; K of a text, padded, and what padding computes is read by no draft row."""

    positions: torch.LongTensor  # (B, K): of the tokens that a contemplate row stands behind
    exists: torch.BoolTensor  # (B, K): False on padding
    routed_by: torch.LongTensor  # (B, K): position whose taps route the `[con]` of the row
    of_row: torch.LongTensor  # (B, T): for each draft row the index of its anchor, or -1


@dataclass(frozen=True)
class AnchorSampling:
    r"""
    How anchors are drawn.

    Each run of draft rows is cut into blocks of `replication + 1` rows with one anchor in each, drawn uniformly; its
    first row, the last prompt token, is an anchor besides. An anchor serves itself and the `replication` rows behind
    it unless a nearer anchor does: the rule by which nodes borrow in decoding. About one row in six is left without f
    (the expected gap between uniform draws from neighbouring blocks), which keeps EAGLE-3 mode trained.

    In decoding the `[con]` of a node at depth d is routed by the newest token with a true hidden state, d + 1 before
    it. Here that lag is uniform in 1..`max_lag`, cut at the last prompt token, which itself has lag 0.
    """

    replication: int  # rows behind an anchor that use its future prediction, l of the paper
    max_lag: int  # greatest depth of a drafted node plus 1
    seed: int = 0

    def draw(self, labels: torch.LongTensor, row_keys: Sequence[int], step: int = 0) -> Anchors:
        """
        Anchors of a batch with labels `(batch, length)`, at a step of the training; 0 for draws that never change.
        Those of a row follow from (seed, step, content of the row) alone. So they are the same however the rows are
        dealt out to batches and processes, and a resumed run draws what an uninterrupted one does.
        """
        rows = draft_rows(labels).cpu()
        starts_run = rows.clone()
        starts_run[:, 1:] &= ~rows[:, :-1]
        positions, routed_by = [], []
        of_row = torch.full(rows.shape, -1, dtype=torch.long)
        for is_row, is_start, key, served in zip(rows, starts_run, row_keys, of_row, strict=True):
            words = np.random.SeedSequence((self.seed, step, key)).generate_state(1)
            generator = torch.Generator().manual_seed(int(words[0]))
            of_text: list[torch.Tensor] = [torch.zeros(0, dtype=torch.long)]
            routers: list[torch.Tensor] = [torch.zeros(0, dtype=torch.long)]
            for start in is_start.nonzero()[:, 0].tolist():
                behind = (~is_row[start:]).nonzero()
                stop = start + int(behind[0]) if len(behind) else len(is_row)
                blocks = torch.arange(start, stop, self.replication + 1)
                drawn = blocks + torch.randint(self.replication + 1, blocks.shape, generator=generator)
                anchors = torch.cat([torch.tensor([start]), drawn[drawn < stop]]).unique()
                lag = torch.randint(1, self.max_lag + 1, anchors.shape, generator=generator)
                of_text.append(anchors)
                routers.append((anchors - lag).clamp(min=start))
            positions.append(torch.cat(of_text))
            routed_by.append(torch.cat(routers))
            for number, anchor in enumerate(positions[-1].tolist()):  # they rise: the nearest one comes last
                served[anchor : anchor + self.replication + 1] = number

        def padded(parts: list[torch.Tensor]) -> torch.Tensor:
            return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True).to(labels.device)

        return Anchors(
            positions=padded(positions),
            exists=padded([torch.ones_like(anchors, dtype=torch.bool) for anchors in positions]),
            routed_by=padded(routed_by),
            of_row=of_row.masked_fill(~rows, -1).to(labels.device),
        )
