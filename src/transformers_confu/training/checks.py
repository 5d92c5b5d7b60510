"""What can be wrong with a training run, said before any work is lost."""

from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..common.answer_text import end_token_ids
from ..common.loading import load_draft
from ..data.dataset import IGNORE_INDEX
from ..inference.modeling_confu import ConFuDraftModel
from ..inference.recurrent_layers import recurrent_mixers
from .arguments import ConFuTrainingArguments


logger = logging.get_logger(__name__)


def check_call(args: Any, kwargs: dict[str, Any]) -> None:
    """Refuse arguments of `ConFuTrainer` that it cannot follow; `kwargs` are those that would go on to `Trainer`."""
    if not isinstance(args, ConFuTrainingArguments):
        raise ValueError(
            f"`args` is a {type(args).__name__}; give `ConFuTrainingArguments(output_dir=...)`, which hold what a "
            "draft's training needs besides."
        )
    for name in ("compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"`{name}` has no effect here: the loss is ConFu's, and there are no logits to measure; leave it "
                "out, and measure in a callback's `on_evaluate`."
            )


def check_stage(stage: str, target: PreTrainedModel) -> None:
    """Refuse to teach contemplation where the places in a text have states that one forward over it does not leave."""
    if stage != "core" and recurrent_mixers(target):
        raise ValueError(
            f"Stage {stage} contemplates at many places of a text, and {type(target).__name__} has recurrent layers, "
            "whose states there are gone when the whole text is read; train stage core alone, and decode with "
            "`confu_contemplation=0`, which is then set."
        )


def draft_to_train(model: Any) -> ConFuDraftModel:
    """The draft itself, of one that is compiled or named; ValueError where that is no draft, or not in float32."""
    if isinstance(model, str):
        model = load_draft(model, torch.float32)
    model = getattr(model, "_orig_mod", model)  # of `torch.compile`
    if not isinstance(model, ConFuDraftModel):
        raise ValueError(
            f"`model` is a {type(model).__name__}, expected a ConFuDraftModel; load one with "
            "`ConFuDraftModel.from_pretrained`. All of a draft is trained, or the groups that are not `frozen`; "
            "adapters of peft are not."
        )
    if model.dtype != torch.float32:
        raise ValueError(
            f"The draft is in {model.dtype}; train it in float32 (`model.float()`) and set `bf16=True` for speed."
        )
    return model


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, target: PreTrainedModel) -> None:
    """
    Refuse a tokenizer that has more tokens than the target; fewer are usual, as embeddings are padded. Warn of one
    that ends texts otherwise, as that of another model would.
    """
    vocab_size = target.config.get_text_config(decoder=True).vocab_size
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, {type(target).__name__} only {vocab_size}: use the target's "
            "own tokenizer."
        )
    ends = end_token_ids(target)
    if ends and tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        logger.warning(
            "The tokenizer ends a text by token %d, and %s by %s: is it the target's own?",
            tokenizer.eos_token_id,
            type(target).__name__,
            " or ".join(map(str, ends)),
        )


def check_dataset(dataset: Dataset, target: PreTrainedModel, name: str, num_steps: int) -> Dataset:
    """
    A dataset without the rows that have nothing to learn from; they are reported. Data, called `name`, that the target
    cannot read or the draft cannot learn from in so many TTT steps is refused.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"`{name}` is a {type(dataset).__name__}; expected a `datasets.Dataset` as `prepare_dataset` makes it. "
            "Rows of similar length share a batch, so it cannot be a stream; give sets one by one to `evaluate`."
        )
    if missing := [column for column in ("input_ids", "labels") if column not in dataset.column_names]:
        raise ValueError(
            f"`{name}` has the columns {', '.join(dataset.column_names)} and lacks {', '.join(missing)}; make it with "
            "`prepare_dataset`."
        )
    config = target.config.get_text_config(decoder=True)
    answers, rows, ids = [], [], []  # of each row: its longest answer, its length, its greatest id
    columns = dataset.select_columns(["input_ids", "labels"]).with_format("numpy")  # no Python list for every row
    for batch in columns.iter(batch_size=1000):
        for input_ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            answers.append(_longest_answer(labels[1:]))  # nothing foretells a first token
            rows.append(len(input_ids))
            ids.append(int(input_ids.max(initial=0)))
    useful = np.array(answers) >= 2
    longest_answer, longest_row, greatest_id = (max(found, default=0) for found in (answers, rows, ids))
    if greatest_id >= config.vocab_size:
        raise ValueError(
            f"`{name}` holds the token id {greatest_id}, but {type(target).__name__} has {config.vocab_size} tokens: "
            "prepare the data with the target's tokenizer."
        )
    if not useful.any():
        raise ValueError(
            f"None of the {len(useful)} rows of `{name}` holds two answer tokens in a row (labels other than "
            f"{IGNORE_INDEX}), so there is nothing to learn: did `max_length` cut the answers away?"
        )
    if num_steps > longest_answer - 1:
        raise ValueError(
            f"`ttt_steps` is {num_steps}, but the longest answer of `{name}` has {longest_answer} tokens, which serve "
            f"{longest_answer - 1} steps at most; lower `ttt_steps` or give longer answers."
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and longest_row > positions:
        raise ValueError(
            f"`{name}` has a row of {longest_row} tokens, but {type(target).__name__} was made for {positions} "
            "(`max_position_embeddings`); prepare the data with a lower `max_length`."
        )
    if useful.all():
        return dataset
    logger.warning("%d of %d rows of `%s` have no answer to learn from; left out.", (~useful).sum(), len(useful), name)
    return dataset.select(np.flatnonzero(useful))


def _longest_answer(labels: np.ndarray) -> int:
    """Length of the longest run of labels that are not ignored."""
    borders = np.flatnonzero(np.diff(np.concatenate([[False], labels != IGNORE_INDEX, [False]])))
    return int(np.diff(borders)[::2].max(initial=0))
