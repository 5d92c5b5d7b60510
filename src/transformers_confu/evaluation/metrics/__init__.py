"""Metrics for `evaluate`: `evaluate.load(metric_path("confu_acceptance"))`.

Each folder is also a Space as it is: `hf upload ORGANISATION/confu_acceptance FOLDER --repo-type space`.
"""

from pathlib import Path


def metric_path(name: str) -> str:
    """Absolute path of `"confu_acceptance"` or `"confu_speedup"`; a relative one would be taken for a Hub id."""
    path = Path(__file__).parent / name
    if not (path / f"{name}.py").is_file():
        raise ValueError(f"There is no metric {name!r}; there are 'confu_acceptance' and 'confu_speedup'.")
    return str(path.resolve())
