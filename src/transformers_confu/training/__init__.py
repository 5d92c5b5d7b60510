"""Training of ConFu drafts. Names are imported on first use, so that a part needs only its own dependencies."""

from importlib import import_module
from typing import Any


_MODULE_OF_NAME = {
    "ConFuTrainer": "trainer",
    "ConFuTrainingArguments": "arguments",
    "DecodingEvaluation": "decoding_callback",
    "warm_start": "initialisation",
    "ConFuDataCollator": "batching",
    "LengthGroupedTokenBatchSampler": "batching",
    "PackedTokenBatchSampler": "batching",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF_NAME[name]}", __name__), name)
