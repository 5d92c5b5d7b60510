"""Training data: rows of text or ids in, token ids with assistant labels out.

Every row becomes `input_ids` and `labels` of equal length. A label equals the id at the *same* position where the
assistant wrote that token and is -100 elsewhere (TRL's convention: labels are not shifted; the loss shifts them).
"""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from .encoding import FEATURES, IGNORE_INDEX, MalformedRow, RowEncoder
from .rows import load_rows


# Of all prompts, those that training never sees. One share and one seed everywhere, so that the answers of one prompt
# are on the same side in every file, every stage and every published dataset.
HELD_OUT_SHARE = 0.02

# More rows than these are worth the start of several processes.
_ROWS_FOR_ONE_PROCESS = 20_000

_ONLY_FOR_THE_REPORT = ["is_first", "is_cut"]


@dataclass
class DatasetReport:
    """What `prepare_dataset` kept, cut and dropped."""

    rows_in: int = 0  # read
    rows_kept: int = 0  # of the prepared dataset
    rows_dropped: int = 0  # read, but without an assistant token within the maximum length
    answers_cut: int = 0  # kept, but an assistant token was lost to the maximum length
    tokens: int = 0  # of the kept rows
    assistant_tokens: int = 0  # of the kept rows, with another label than -100

    def __str__(self) -> str:
        return (
            f"rows: {self.rows_kept:,} made of {self.rows_in:,}; dropped, without an assistant token in the "
            f"maximum length: {self.rows_dropped:,}\n"
            f"tokens: {self.tokens:,}, of which the assistant wrote {self.assistant_tokens:,}\n"
            f"answers cut at the maximum length: {self.answers_cut:,}"
        )


def prepare_dataset(
    rows: str | Path | Dataset | Iterable[str | Path | Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    vocab_size: int | None = None,
    made_by: str | None = None,
    num_proc: int | None = None,
    report: DatasetReport | None = None,
) -> Dataset:
    """
    Turn rows of text or ids into a dataset with columns `input_ids`, `labels` (lists of int32) and `prompt_hash`.

    A row holds one of

    - `messages`: rendered by the chat template; every assistant turn is labelled, with its end-of-turn token. Where a
      template renders an earlier turn otherwise than the newest (Qwen3's drops its reasoning), each answer becomes a
      row of its own, with the text before it as the target saw it;
    - `messages` with, for each answer, its `answer_ids` and the `prompt_ids` before it (rendered again if not given),
      as `regenerate` writes it. Ids are taken as they are: tokenised again, text may give other tokens;
    - `prompt` (a user turn or messages) and its `answer_ids`, or its `completion` (TRL's form; text or messages);
    - `input_ids` and `labels`: passed through after a check.

    It may also hold `tools` (a list of JSON schemas) and `chat_template_kwargs`, each also as JSON, for the chat
    template. Rows longer than `max_length` lose their right end. One without any assistant token left is dropped.

    Rows from a file, folder or the Hub are tokenised once: the outcome lies in the cache of `datasets`, mapped into
    memory, and is found again for the same rows, tokenizer and settings. In several processes, call this under
    `TrainingArguments.main_process_first()`.

    Args:
        rows: A source that `load_rows` reads, a dataset, or several sources or rows.
        tokenizer: The target's. Rows with `messages` alone need a fast one (character offsets).
        max_length: Longest row, in tokens.
        vocab_size: The target's vocabulary size, the bound of given ids. Defaults to the tokenizer's.
        made_by: Refuse answers that say they were made by another target than this `fingerprint_of_target`.
        num_proc: Processes that tokenise. By default up to 8 for many rows.
        report: A new one, filled in.
    """
    if max_length < 2:
        raise ValueError(f"max_length is {max_length}, expected at least 2 tokens: one to read, one to predict.")
    encoder = RowEncoder(tokenizer, max_length, len(tokenizer) if vocab_size is None else vocab_size, made_by)
    sources = _sources(rows)
    prepared = [_tokenise(dataset, name, encoder, num_proc) for name, dataset in sources if len(dataset)]
    report = DatasetReport() if report is None else report
    _count(report, prepared, sum(len(dataset) for _, dataset in sources))
    if not report.rows_kept:
        raise ValueError(
            f"None of {report.rows_in} rows holds an assistant token among its first {max_length}: give rows with "
            "assistant answers, and a max_length above their prompts."
        )
    return concatenate_datasets([part.remove_columns(_ONLY_FOR_THE_REPORT) for part in prepared])


def sequence_lengths(dataset: Dataset) -> list[int]:
    """Length of every row of a prepared dataset, in tokens and in the dataset's order."""
    lengths: list[int] = []
    for batch in dataset.select_columns("input_ids").with_format("arrow").iter(batch_size=1000):
        lengths.extend(pc.list_value_length(batch["input_ids"]).to_pylist())
    return lengths


def place_of_prompt(hashed_prompt: str) -> float:
    """Of a prompt in 0..1, by its hash: those below the held-out share are the ones that training never sees."""
    return int.from_bytes(hashlib.blake2b(hashed_prompt.encode(), digest_size=7).digest(), "big") / 2**56


def split_by_prompt(
    dataset: Dataset, share: float = HELD_OUT_SHARE, num_rows: int | None = None
) -> tuple[Dataset, Dataset | None]:
    """
    Split a prepared dataset into rows to train on and held-out rows, `None` for a share of 0.

    A hash of its prompt decides where a row goes, and nothing else: every answer to a prompt and every turn of its
    conversation is on the same side, in whatever file, order, stage or maximum length it comes.

    Args:
        share: Of the prompts, to hold out.
        num_rows: At most so many held-out rows are returned. The others are left out, not trained on.
    """
    if not 0 <= share < 1:
        raise ValueError(f"The share of held-out prompts is {share}, expected 0 or more and less than 1.")
    if share == 0:
        return dataset, None
    hashes = [hashed for batch in dataset.select_columns("prompt_hash").iter(1000) for hashed in batch["prompt_hash"]]
    of_prompt = {hashed: place_of_prompt(hashed) for hashed in set(hashes)}
    places = np.array([of_prompt[hashed] for hashed in hashes])
    held_out = np.flatnonzero(places < share)
    if len(held_out) in (0, len(dataset)):
        which = "Every one" if len(held_out) else "None"
        raise ValueError(
            f"{which} of {len(of_prompt)} prompts is held out by a share of {share}: give more data or another share; "
            "a share of 0 holds out nothing."
        )
    # In the order of the hash: the same prompts come first, whatever else the data holds.
    held_out = held_out[np.argsort(places[held_out], kind="stable")][:num_rows]
    return dataset.select(np.flatnonzero(places >= share)), dataset.select(held_out)


def _sources(rows: Any) -> list[tuple[str, Dataset]]:
    """The given rows as datasets, each with a name for errors."""
    if isinstance(rows, Dataset):
        return [("", rows)]
    if isinstance(rows, DatasetDict):
        raise ValueError(f"The rows are a DatasetDict with the splits {', '.join(rows)}: give one of them.")
    rows = [rows] if isinstance(rows, str | Path) else list(rows)
    if rows and all(isinstance(row, str | Path) for row in rows):
        return [(str(source), load_rows(source)) for source in rows]
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    return [("", Dataset.from_dict(columns, on_mixed_types="use_json"))]


def _tokenise(rows: Dataset, name: str, encoder: RowEncoder, num_proc: int | None) -> Dataset:
    """The prepared rows with the columns of the report, from the cache if they are there."""
    if num_proc is None and len(rows) > _ROWS_FOR_ONE_PROCESS:
        num_proc = min(8, os.cpu_count() or 1)
    fingerprint = hashlib.sha256(f"{rows._fingerprint} {encoder.fingerprint()}".encode()).hexdigest()[:16]
    cache = None
    if rows.cache_files:  # otherwise they lie in memory, and so does the outcome
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "transformers_confu"
        folder.mkdir(parents=True, exist_ok=True)
        cache = str(folder / f"prepared-{fingerprint}.arrow")
    try:
        return rows.map(
            encoder,
            batched=True,
            with_indices=True,
            fn_kwargs={"name": name},
            remove_columns=rows.column_names,
            features=FEATURES,
            num_proc=num_proc,
            cache_file_name=cache,
            new_fingerprint=fingerprint,
            desc=f"Tokenising {Path(name).name}".rstrip(),
        )
    except MalformedRow as error:  # raised again here, as it may come from another process
        raise ValueError(str(error)) from error


def _count(report: DatasetReport, prepared: Sequence[Dataset], rows_in: int) -> None:
    report.rows_in = report.rows_dropped = rows_in
    for part in prepared:
        for batch in part.with_format("arrow").iter(batch_size=1000):
            labels = pc.list_flatten(batch["labels"]).to_numpy()
            report.rows_kept += len(batch)
            report.rows_dropped -= pc.sum(batch["is_first"]).as_py() or 0
            report.answers_cut += pc.sum(batch["is_cut"]).as_py() or 0
            report.tokens += len(labels)
            report.assistant_tokens += int(np.count_nonzero(labels != IGNORE_INDEX))
