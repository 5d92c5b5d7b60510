"""Training data: rows of text or ids in, token ids with assistant labels out.

Every row becomes `input_ids` and `labels` of equal length. A label equals the id at the *same* position where the
assistant wrote that token and is -100 elsewhere (TRL's convention: labels are not shifted; the loss shifts them).
"""

import hashlib
import json
import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import transformers
from datasets import Dataset, DatasetDict, Features, List, Value, concatenate_datasets
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from . import chat_template
from .chat_template import TEMPLATE_FIELDS, ChatTemplate, Messages, Span, check_messages, encode_prompt
from .rows import load_rows


logger = logging.get_logger(__name__)

IGNORE_INDEX = -100

# Of all prompts, those that training never sees. One share and one seed everywhere, so that the answers of one prompt
# are on the same side in every file, every stage and every published dataset.
HELD_OUT_SHARE = 0.02

# More rows than these are worth the start of several processes.
_ROWS_FOR_ONE_PROCESS = 20_000

_FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "prompt_hash": Value("string"),
        "is_first": Value("bool"),  # of the rows made of one given row
        "is_cut": Value("bool"),
    }
)
_ONLY_FOR_THE_REPORT = ["is_first", "is_cut"]

Encoded = tuple[list[int], list[int]]  # input_ids and labels


@dataclass
class DatasetReport:
    """What `prepare_dataset` kept, cut and dropped.

    Attributes:
        rows_in: rows read.
        rows_kept: rows of the prepared dataset.
        rows_dropped: rows read that hold no assistant token within the maximum length.
        rows_split_off: rows made of further answers of a conversation, where the chat template renders an earlier turn
            otherwise than the newest one; each is a row of its own then.
        answers_cut: kept rows that lost at least one assistant token to the maximum length.
        tokens: tokens of the kept rows.
        assistant_tokens: tokens of the kept rows whose label is not -100.
    """

    rows_in: int = 0
    rows_kept: int = 0
    rows_dropped: int = 0
    rows_split_off: int = 0
    answers_cut: int = 0
    tokens: int = 0
    assistant_tokens: int = 0

    def __str__(self) -> str:
        lines = [f"rows: {self.rows_kept:,} made of {self.rows_in:,}"]
        if self.rows_dropped:
            lines.append(f"  dropped, without an assistant token in the maximum length: {self.rows_dropped:,}")
        if self.rows_split_off:
            lines.append(f"  further answers of conversations, as rows of their own: {self.rows_split_off:,}")
        lines.append(f"tokens: {self.tokens:,}, of which the assistant wrote {self.assistant_tokens:,}")
        lines.append(f"answers cut at the maximum length: {self.answers_cut:,}")
        return "\n".join(lines)


def prepare_dataset(
    rows: str | Path | Dataset | Iterable[str | Path | Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    eos_token_ids: Sequence[int] | None = None,
    vocab_size: int | None = None,
    made_by: str | None = None,
    num_proc: int | None = None,
    report: DatasetReport | None = None,
) -> Dataset:
    """
    Turn rows of text or ids into a dataset with columns `input_ids`, `labels` (lists of int32) and `prompt_hash`.

    A row is one of

    - `{"messages": [{"role", "content"}, ...]}`: rendered by the chat template; every assistant turn is labelled, its
      end-of-turn token included, the line break a template puts behind it not. Templates need no `{% generation %}`
      markers. Where a template renders an earlier turn otherwise than the newest (Qwen3's drops its reasoning), each
      answer becomes a row of its own, with the text before it as the target saw it.
    - an answered conversation as `regenerate` writes it: `messages` and, for each answer, its `answer_ids` and the
      `prompt_ids` before it (rendered again if not given). Ids are taken as they are: text that is tokenised again
      may give other tokens than the target chose.
    - `{"prompt": str | messages, "answer_ids": [int, ...]}`: one prompt (a string is one user turn) and its answer.
    - `{"input_ids": [int, ...], "labels": [int, ...]}`: passed through after a check.

    A row may also hold `tools` (a list of JSON schemas) and `chat_template_kwargs` (such as
    `{"enable_thinking": false}`), each also as JSON, which go to the chat template: give those that the target answers
    with. Rows longer than `max_length` lose their right end. A row without any assistant token left is dropped.

    Rows from a file, folder or the Hub are tokenised once: the outcome lies in the cache of `datasets`, mapped into
    memory, and is found again by every process and stage that asks for the same rows, tokenizer and settings. In
    several processes, call this under `TrainingArguments.main_process_first()`.

    Args:
        rows: A source that `load_rows` reads, a dataset, or several sources or rows.
        tokenizer: The target's. Rows with `messages` alone need a fast one (character offsets).
        max_length: Longest row, in tokens.
        eos_token_ids: Ids that end a turn; used where a template's `{% generation %}` block stops just before
            them. Defaults to the tokenizer's `eos_token_id`; pass the target's list where its turns end otherwise.
        vocab_size: The target's vocabulary size, the bound of given ids. Defaults to the tokenizer's.
        made_by: Refuse answers that say they were made by another target than this `fingerprint_of_target`.
        num_proc: Processes that tokenise. By default up to 8 for many rows.
        report: Filled in with what was kept, cut and dropped; also logged at level INFO.

    Raises:
        ValueError: a row is malformed (the message names it), the chat template cannot be used, or nothing is left.
    """
    if max_length < 2:
        raise ValueError(f"max_length is {max_length}, expected at least 2 tokens: one to read, one to predict.")
    if eos_token_ids is None:
        eos_token_ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoder = _Encoder(
        tokenizer, max_length, sorted(eos_token_ids), len(tokenizer) if vocab_size is None else vocab_size, made_by
    )
    sources = _sources(rows)
    prepared = [_tokenise(dataset, name, encoder, num_proc) for name, dataset in sources if len(dataset)]
    found = _report(prepared, sum(len(dataset) for _, dataset in sources))
    if report is not None:
        for entry in fields(found):
            setattr(report, entry.name, getattr(found, entry.name))
    if not found.rows_kept:
        raise ValueError(
            f"None of {found.rows_in} rows holds an assistant token among its first {max_length}: give rows with "
            "assistant answers, and a max_length above their prompts."
        )
    logger.info("Prepared the training data.\n%s", found)
    return concatenate_datasets([part.remove_columns(_ONLY_FOR_THE_REPORT) for part in prepared])


def sequence_lengths(dataset: Dataset) -> list[int]:
    """Length of every row of a prepared dataset, in tokens and in the dataset's order."""
    lengths: list[int] = []
    for batch in dataset.select_columns("input_ids").with_format("arrow").iter(batch_size=1000):
        lengths.extend(pc.list_value_length(batch["input_ids"]).to_pylist())
    return lengths


def prompt_hash(text: str) -> str:
    """Hash of a conversation's first user turn; case, kinds of white space and of equal characters do not matter."""
    normalised = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return hashlib.blake2b(normalised.encode(), digest_size=8).hexdigest()


def is_held_out(hashed_prompt: str, share: float = HELD_OUT_SHARE, seed: int = 0) -> bool:
    """Whether a prompt belongs to the share that training never sees."""
    return _place(hashed_prompt, seed) < share


def split_by_prompt(
    dataset: Dataset, share: float = HELD_OUT_SHARE, num_rows: int | None = None, seed: int = 0
) -> tuple[Dataset, Dataset | None]:
    """
    Split a dataset into rows to train on and held-out rows.

    A hash of its prompt decides where a row goes, and nothing else: every answer to a prompt and every turn of its
    conversation is on the same side, in whatever file, order, stage or maximum length it comes.

    Args:
        dataset: With a column `prompt_hash`, as `prepare_dataset` makes it.
        share: Of the prompts, to hold out.
        num_rows: At most so many held-out rows are returned. The others are left out, not trained on.
        seed: Another seed holds out other prompts.

    Returns:
        Rows to train on, and held-out rows; `None` for a share of 0.

    Raises:
        ValueError: the share is no share, or one side is empty.
    """
    if not 0 <= share < 1:
        raise ValueError(f"The share of held-out prompts is {share}, expected 0 or more and less than 1.")
    if share == 0:
        return dataset, None
    hashes = [hashed for batch in dataset.select_columns("prompt_hash").iter(1000) for hashed in batch["prompt_hash"]]
    of_prompt = {hashed: _place(hashed, seed) for hashed in set(hashes)}
    places = np.array([of_prompt[hashed] for hashed in hashes])
    held_out = np.flatnonzero(places < share)
    if len(held_out) in (0, len(dataset)):
        which = "None" if len(held_out) == 0 else "Every one"
        raise ValueError(
            f"{which} of {len(of_prompt)} prompts is held out by a share of {share}: give more data or another share; "
            "a share of 0 holds out nothing."
        )
    # In the order of the hash: the same prompts come first, whatever else the data holds.
    held_out = held_out[np.argsort(places[held_out], kind="stable")][:num_rows]
    return dataset.select(np.flatnonzero(places >= share)), dataset.select(held_out)


def _place(hashed_prompt: str, seed: int) -> float:
    digest = hashlib.blake2b(hashed_prompt.encode(), digest_size=7, salt=seed.to_bytes(8, "big", signed=True))
    return int.from_bytes(digest.digest(), "big") / 2**56


def _sources(rows: Any) -> list[tuple[str, Dataset]]:
    """The given rows as datasets, each with a name for errors."""
    if isinstance(rows, Dataset):
        return [("", rows)]
    if isinstance(rows, DatasetDict):
        raise ValueError(f"The rows are a DatasetDict with the splits {', '.join(rows)}: give one of them.")
    if isinstance(rows, str | Path):
        rows = [rows]
    rows = list(rows)
    if rows and all(isinstance(row, str | Path) for row in rows):
        return [(str(source), load_rows(source)) for source in rows]
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    return [("", Dataset.from_dict(columns, on_mixed_types="use_json"))]


def _tokenise(rows: Dataset, name: str, encoder: "_Encoder", num_proc: int | None) -> Dataset:
    """The prepared rows with the columns of the report, from the cache if they are there."""
    if num_proc is None and len(rows) > _ROWS_FOR_ONE_PROCESS:
        num_proc = min(8, os.cpu_count() or 1)
    fingerprint = hashlib.sha256(f"{rows._fingerprint} {encoder.fingerprint()}".encode()).hexdigest()[:16]
    cache = None
    if rows.cache_files:  # otherwise they lie in memory, and so does the outcome
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "transformers_confu"
        folder.mkdir(parents=True, exist_ok=True)
        cache = str(folder / f"prepared-{fingerprint}.arrow")
    return rows.map(
        encoder,
        batched=True,
        with_indices=True,
        fn_kwargs={"name": name},
        remove_columns=rows.column_names,
        features=_FEATURES,
        num_proc=num_proc,
        cache_file_name=cache,
        new_fingerprint=fingerprint,
        desc=f"Tokenising {Path(name).name}".rstrip(),
    )


def _report(prepared: Sequence[Dataset], rows_in: int) -> DatasetReport:
    report = DatasetReport(rows_in=rows_in, rows_dropped=rows_in)
    for part in prepared:
        for batch in part.with_format("arrow").iter(batch_size=1000):
            labels = pc.list_flatten(batch["labels"]).to_numpy()
            firsts = pc.sum(batch["is_first"]).as_py() or 0
            report.rows_kept += len(batch)
            report.rows_dropped -= firsts
            report.rows_split_off += len(batch) - firsts
            report.answers_cut += pc.sum(batch["is_cut"]).as_py() or 0
            report.tokens += len(labels)
            report.assistant_tokens += int(np.count_nonzero(labels != IGNORE_INDEX))
    return report


@dataclass
class _Encoder:
    """Turns a batch of given rows into prepared ones; several processes work on copies of it."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    eos_token_ids: list[int]
    vocab_size: int
    made_by: str | None

    def fingerprint(self) -> str:
        """Hash of all that the outcome depends on besides the rows, this code included."""
        tokenizer = self.tokenizer
        if getattr(tokenizer, "is_fast", False):
            state = json.loads(tokenizer.backend_tokenizer.to_str())
            state |= {"padding": None, "truncation": None}  # of earlier calls of it
        else:
            state = tokenizer.get_vocab()
        parts = (
            *(type(tokenizer).__name__, state, tokenizer.chat_template, tokenizer.special_tokens_map),
            *(self.max_length, self.eos_token_ids, self.vocab_size, self.made_by, transformers.__version__),
            *(Path(file).read_text(encoding="utf-8") for file in (__file__, chat_template.__file__)),
        )
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def __call__(self, batch: Mapping[str, list[Any]], indices: list[int], name: str) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {column: [] for column in _FEATURES}
        for place, index in enumerate(indices):
            # Arrow fills the entries that a row lacks with None.
            row = {column: values[place] for column, values in batch.items() if values[place] is not None}
            try:
                encoded, hashed_prompt = self._encode(row), self._prompt_hash(row)
            except ValueError as error:
                raise ValueError(f"Row {index}{f' of {name}' if name else ''}: {error}") from error
            is_first = True
            for input_ids, labels in encoded:
                kept = _count_assistant(labels[: self.max_length])
                if kept:
                    columns["input_ids"].append(input_ids[: self.max_length])
                    columns["labels"].append(labels[: self.max_length])
                    columns["prompt_hash"].append(hashed_prompt)
                    columns["is_first"].append(is_first)
                    columns["is_cut"].append(kept < _count_assistant(labels))
                    is_first = False
        return columns

    def _encode(self, row: dict[str, Any]) -> list[Encoded]:
        template_options = [row.get(name) for name in TEMPLATE_FIELDS]
        if {"input_ids", "labels"} <= row.keys():
            return [self._tokenised(row["input_ids"], row["labels"])]
        if "answer_ids" in row and row.keys() & {"prompt", "messages"}:
            return self._answered(row, template_options)
        if "messages" in row:
            return self._conversation(row["messages"], template_options)
        if row.keys() & {"prompt", "turns"}:
            raise ValueError(
                "it holds a prompt without 'answer_ids': a draft learns from the target's own answers, so let the "
                "target answer the prompts first (`regenerate`, or `regenerate_served` through a server)."
            )
        if "conversations" in row:
            raise ValueError(
                "it holds 'conversations' (ShareGPT's form): make prompts of them with `build_prompts` and let the "
                "target answer these, or pass 'messages' with role and content."
            )
        raise ValueError(
            f"it has the fields {sorted(row)}, expected 'messages', or 'prompt' and 'answer_ids', or 'input_ids' "
            f"and 'labels'."
        )

    def _tokenised(self, input_ids: Any, labels: Any) -> Encoded:
        input_ids, labels = self._check_ids(input_ids, "input_ids"), _int_list(labels, "labels")
        if len(input_ids) != len(labels):
            raise ValueError(f"it has {len(input_ids)} input_ids and {len(labels)} labels, expected as many of both.")
        for position, (token, label) in enumerate(zip(input_ids, labels, strict=True)):
            if label not in (IGNORE_INDEX, token):
                raise ValueError(
                    f"label {label} at position {position} is neither {IGNORE_INDEX} nor the id {token} of that "
                    f"position: labels are not shifted here."
                )
        return input_ids, labels

    def _answered(self, row: Mapping[str, Any], template_options: list[Any]) -> list[Encoded]:
        """Answers by their ids; one row as long as the prompt of a turn begins with the tokens of the turn before."""
        made_with = row.get("made_with") or {}
        made_with = json.loads(made_with) if isinstance(made_with, str) else made_with
        target = made_with.get("target")
        if self.made_by is not None and target is not None and target != self.made_by:
            raise ValueError(
                f"its answer was made by another target ({target}) than the one to train for ({self.made_by}), as "
                "after the target was trained again: let the target answer the prompts anew, or allow answers of "
                "other targets if they are meant."
            )
        prompts, answers = row.get("prompt_ids"), row["answer_ids"]
        if "prompt" in row:
            prompts, answers = [encode_prompt(row["prompt"], self.tokenizer, *template_options)], [answers]
        elif prompts is None:
            messages = check_messages(row["messages"])
            places = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
            places = places[len(places) - len(answers) :]
            prompts = [encode_prompt(messages[:place], self.tokenizer, *template_options) for place in places]
        if len(prompts) != len(answers):
            raise ValueError(
                f"it has {len(answers)} 'answer_ids' to {len(prompts)} prompts, expected as many of both."
            )
        rows: list[Encoded] = []
        for prompt, answer in zip(prompts, answers, strict=True):
            prompt, answer = self._check_ids(prompt, "prompt_ids"), self._check_ids(answer, "answer_ids")
            labels = [IGNORE_INDEX] * len(prompt)
            if rows and prompt[: len(rows[-1][0])] == rows[-1][0]:
                before = rows.pop()[1]
                labels[: len(before)] = before
            rows.append((prompt + answer, labels + answer))
        return rows

    def _conversation(self, messages: Messages, template_options: list[Any]) -> list[Encoded]:
        rows = []
        for input_ids, spans in ChatTemplate(self.tokenizer, *template_options).label(check_messages(messages)):
            labels = [IGNORE_INDEX] * len(input_ids)
            for span in spans:
                first, last = self._with_end_of_turn(input_ids, span)
                labels[first:last] = input_ids[first:last]
            rows.append((input_ids, labels))
        return rows

    def _with_end_of_turn(self, input_ids: list[int], span: Span) -> Span:
        """The span up to behind its end-of-turn token, without the template's line break."""
        first, last = span
        stripped = last
        while stripped > first and not self.tokenizer.decode([input_ids[stripped - 1]]).strip():
            stripped -= 1
        if stripped > first and input_ids[stripped - 1] in self.eos_token_ids:
            return first, stripped
        if last < len(input_ids) and input_ids[last] in self.eos_token_ids:
            return first, last + 1  # white space before it is the assistant's own
        return first, stripped

    def _prompt_hash(self, row: Mapping[str, Any]) -> str:
        """Of the first user turn; of a row that is ids alone, the hash it comes with or that of its first prompt."""
        prompt = row.get("messages", row.get("prompt"))
        if "prompt_hash" in row:
            return row["prompt_hash"]
        if "input_ids" in row:
            labels = row["labels"]
            answer = next((place for place, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
            return prompt_hash(self.tokenizer.decode(row["input_ids"][:answer]))
        if isinstance(prompt, str):
            return prompt_hash(prompt)
        said = [message.get("content", "") for message in check_messages(prompt) if message["role"] == "user"]
        return prompt_hash(said[0] if said else "")

    def _check_ids(self, ids: Any, name: str) -> list[int]:
        ids = _int_list(ids, name)
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ValueError(
                f"{name} span {min(ids)} to {max(ids)}, expected ids from 0 to {self.vocab_size - 1}: they belong to "
                f"another tokenizer than the one given."
            )
        return ids


def _int_list(values: Any, name: str) -> list[int]:
    values = list(values) if isinstance(values, Sequence) else values
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise ValueError(f"{name} is {values!r:.80}, which are not integers; expected a flat list of token ids.")
    return values


def _count_assistant(labels: list[int]) -> int:
    return len(labels) - labels.count(IGNORE_INDEX)
