"""Parts of sentences that errors and reports share."""

from collections.abc import Iterable


def some(names: Iterable[str], most: int = 6) -> str:
    """Names in a sentence: the first few, and how many more."""
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
