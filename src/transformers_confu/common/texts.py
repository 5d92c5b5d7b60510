"""Where two answers part, and when rounding explains it."""

from collections.abc import Sequence


# The largest gap of two scores that the rounding of fp32 explains; texts that part there are a proven tie.
TIE = 1e-4


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Index of the first token in which two answers differ; a missing token differs too. `None` if they are equal."""
    for index, (mine, theirs) in enumerate(zip(one, other, strict=False)):
        if mine != theirs:
            return index
    return None if len(one) == len(other) else min(len(one), len(other))
