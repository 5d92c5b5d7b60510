"""Accepted length of speculative decoding from the counts of its rounds: the formula, and a metric for `evaluate`."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate


_DESCRIPTION = """
Accepted length of speculative decoding. A round is one forward of the target that checks drafted tokens; it emits the
accepted ones and one token of the target's own. tau is tokens emitted in rounds / rounds, both counted over all texts.
The token that prefill emits is in no round; tokens beyond the end of a text (EOS, maximal length) are not emitted.
"""

_KWARGS_DESCRIPTION = """
Args:
    emitted (list of list of int): For each text, the tokens that each round emitted.
    accepted (list of list of int): For each text, how many of them were drafted: emitted - 1, or emitted where the
        text ends on a drafted token.
Returns:
    tau (float): Tokens emitted per round; NaN without a round.
    tokens, rounds (int): What tau is the quotient of.
    accepted_by_depth (list of int): Entry d - 1 counts the rounds that accepted d tokens or more.
    survival (list of float): The same as a share of all rounds, P(accepted >= d).
    conditional (list of float): Share of the rounds that accepted d - 1 tokens or more which accepted d or more.
Examples:
    >>> metric = evaluate.load(metric_path("confu_acceptance"))
    >>> metric.compute(emitted=[[3, 1], [2, 2]], accepted=[[2, 0], [1, 2]])["tau"]
    2.0
"""


class ConfuAcceptance(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        counts = datasets.Sequence(datasets.Value("int32"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="https://arxiv.org/abs/2603.08899",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"emitted": counts, "accepted": counts}),
        )

    def _compute(self, emitted: Sequence[Sequence[int]], accepted: Sequence[Sequence[int]]) -> dict[str, Any]:
        return acceptance(emitted, accepted)


def acceptance(emitted: Sequence[Sequence[int]], accepted: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The metric on plain lists; see the description above."""
    for number, (one, other) in enumerate(zip(emitted, accepted, strict=True)):
        if len(one) != len(other) or any(e - a not in (0, 1) or a < 0 for e, a in zip(one, other, strict=True)):
            raise ValueError(
                f"Text {number} emitted {list(one)} and accepted {list(other)}; expected one count for each round, "
                "and emitted - accepted to be 1, or 0 where the text ends on a drafted token."
            )
    flat = [count for text in accepted for count in text]
    rounds, tokens = len(flat), sum(count for text in emitted for count in text)
    by_depth = [sum(count >= depth for count in flat) for depth in range(1, max(flat, default=0) + 1)]
    at_risk = [rounds, *by_depth]
    return {
        "tau": tokens / rounds if rounds else float("nan"),
        "tokens": tokens,
        "rounds": rounds,
        "accepted_by_depth": by_depth,
        "survival": [count / rounds for count in by_depth],
        "conditional": [count / before for count, before in zip(by_depth, at_risk, strict=False)],
    }
