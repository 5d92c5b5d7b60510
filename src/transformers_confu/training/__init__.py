"""Training of ConFu drafts. Names are imported on first use, so that a part needs only its own dependencies."""

from importlib import import_module
from typing import Any


_MODULE_OF_NAME = {
    "ConFuTrainer": "trainer",
    "ConFuTrainingArguments": "arguments",
    "DecodingEvaluation": "decoding",
    "warm_start": "initialisation",
    "ConFuDataCollator": "batching",
    "DatasetReport": "data",
    "LengthGroupedTokenBatchSampler": "batching",
    "PackedTokenBatchSampler": "batching",
    "load_jsonl": "data",
    "load_rows": "data",
    "prepare_dataset": "data",
    "sequence_lengths": "data",
    "EvaluationOverlap": "prompts",
    "PromptSource": "prompts",
    "build_prompts": "prompts",
    "find_sources": "prompts",
    "RegenerationReport": "regeneration",
    "regenerate": "regeneration",
    "ServedRegenerationReport": "served_regeneration",
    "regenerate_served": "served_regeneration",
    "next_prompt": "turns",
    "regenerate_turns": "regeneration",
    "DraftVocabulary": "vocabulary",
    "build_draft_vocabulary": "vocabulary",
    "count_assistant_tokens": "vocabulary",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF_NAME[name]}", __name__), name)
