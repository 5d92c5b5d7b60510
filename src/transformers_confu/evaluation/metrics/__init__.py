"""Metrics for `evaluate`: `evaluate.load(metric_path("confu_acceptance"))`."""

from pathlib import Path


def metric_path(name: str) -> str:
    """Absolute path of `"confu_acceptance"` or `"confu_speedup"`; a relative one would be taken for a Hub id."""
    path = Path(__file__).resolve().with_name(f"{name}.py")
    if name not in ("confu_acceptance", "confu_speedup"):
        raise ValueError(f"There is no metric {name!r}; there are 'confu_acceptance' and 'confu_speedup'.")
    return str(path)
