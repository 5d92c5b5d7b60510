"""Data for training: prompts, the target's answers, datasets, vocabularies. Names are imported on first use."""

from typing import Any

from ..common.extras import require


_MODULE_OF_NAME = {
    "DatasetReport": "dataset",
    "load_rows": "rows",
    "prepare_dataset": "dataset",
    "split_by_prompt": "dataset",
    "encode_prompt": "chat_template",
    "publish_answers": "publication",
    "EvaluationOverlap": "prompts",
    "PromptSource": "prompts",
    "build_prompts": "prompts",
    "find_sources": "prompts",
    "regenerate": "regeneration",
    "regenerate_served": "served_regeneration",
    "DraftVocabulary": "vocabulary",
    "build_draft_vocabulary": "vocabulary",
    "count_assistant_tokens": "vocabulary",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(require(f".{_MODULE_OF_NAME[name]}", __name__), name)
