"""Metrics for `evaluate`: `evaluate.load(metric_path("confu_acceptance"))`."""

from pathlib import Path


def metric_path(name: str) -> str:
    """Absolute path of `"confu_acceptance"` or `"confu_speedup"`; a relative one would be taken for a Hub id."""
    return str(Path(__file__).resolve().with_name(f"{name}.py"))
