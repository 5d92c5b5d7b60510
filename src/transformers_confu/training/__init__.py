"""Training of ConFu drafts. Names are imported on first use, so that a part needs only its own dependencies."""

from typing import Any

from ..common.extras import require


_MODULE_OF_NAME = {
    "ConFuTrainer": "trainer",
    "ConFuTrainingArguments": "arguments",
    "warm_start": "initialisation",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(require(f".{_MODULE_OF_NAME[name]}", __name__), name)
