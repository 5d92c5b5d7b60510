"""Training data: rows of text or ids in, token ids with assistant labels out.

Every row becomes `input_ids` and `labels` of equal length. A label equals the id at the *same* position where the
assistant wrote that token and is -100 elsewhere (TRL's convention: labels are not shifted; the loss shifts them).
"""

import gzip
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value, concatenate_datasets
from datasets import Sequence as SequenceFeature
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging
from transformers.utils.chat_template_utils import render_jinja_template


logger = logging.get_logger(__name__)

IGNORE_INDEX = -100

# Rows held as Python lists before they are packed into Arrow; bounds the peak memory of a large corpus.
_ROWS_PER_CHUNK = 1000

_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")

Messages = list[dict[str, Any]]


@dataclass
class DatasetReport:
    """What `prepare_dataset` kept, cut and dropped.

    Attributes:
        rows_in: rows read.
        rows_kept: rows of the prepared dataset.
        dropped: number of dropped rows by reason.
        answers_truncated: kept rows that lost at least one assistant token to `max_length`.
        tokens: tokens of the kept rows.
        assistant_tokens: tokens of the kept rows whose label is not -100.
        vocabulary_coverage: share (0..1) of the assistant tokens that the draft vocabulary holds. Left None by
            `prepare_dataset`; whoever builds the vocabulary fills it in.
    """

    rows_in: int = 0
    rows_kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    answers_truncated: int = 0
    tokens: int = 0
    assistant_tokens: int = 0
    vocabulary_coverage: float | None = None

    def __str__(self) -> str:
        lines = [f"rows: {self.rows_kept:,} kept of {self.rows_in:,}"]
        lines += [f"  dropped, {reason}: {number:,}" for reason, number in sorted(self.dropped.items())]
        lines.append(f"tokens: {self.tokens:,}, of which the assistant wrote {self.assistant_tokens:,}")
        lines.append(f"answers cut at the maximum length: {self.answers_truncated:,}")
        if self.vocabulary_coverage is not None:
            lines.append(f"assistant tokens within the draft vocabulary: {self.vocabulary_coverage:.2%}")
        return "\n".join(lines)


def load_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Reads a `.jsonl` or `.jsonl.gz` file of one JSON object per line; blank lines are skipped.

    The file is read whole, so that a bad line shows before any row is worked on.

    Raises:
        ValueError: a line is not a JSON object (the message names file and line), or the file is cut short.
    """
    path = Path(path)
    rows = []
    number = 0
    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    rows.append(parse_json_object(line, path, number))
        except (EOFError, gzip.BadGzipFile) as error:
            raise ValueError(
                f"{path} cannot be decompressed after line {number} ({error}): fetch or write the file again."
            ) from error
    return rows


def parse_json_object(line: bytes, path: Path, number: int) -> dict[str, Any]:
    """The object of one line of a JSONL file; `path` and `number` (from 1) go into the ValueError of a bad line."""
    try:
        row = json.loads(line)
    except ValueError as error:  # covers bad JSON and bad UTF-8
        raise ValueError(f"{path}, line {number} is not JSON ({error}): expected one JSON object per line.") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path}, line {number} holds a {type(row).__name__}: expected one JSON object per line.")
    return row


def prepare_dataset(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    eos_token_ids: Sequence[int] | None = None,
    vocab_size: int | None = None,
    report: DatasetReport | None = None,
) -> Dataset:
    """Turns rows of text or ids into a dataset with columns `input_ids` and `labels` (lists of int32).

    A row is one of

    - `{"messages": [{"role", "content"}, ...]}`: rendered by the chat template; every assistant turn is labelled, its
      end-of-turn token included, the line break a template puts behind it not.
    - `{"prompt": str | messages, "answer_ids": [int, ...]}`: the prompt rendered with the generation prompt (a string
      is one user turn), then the ids exactly as given. They are never decoded and tokenised again, since that
      would change the tokens the target really chose.
    - `{"input_ids": [int, ...], "labels": [int, ...]}`: passed through after a check.

    Rows longer than `max_length` lose their right end. A row without any assistant token left is dropped.

    Args:
        rows: any iterable of rows, a `datasets.Dataset` included; kinds may be mixed.
        tokenizer: the target's tokenizer. Rows with `messages` need a fast one (character offsets).
        max_length: longest row, in tokens.
        eos_token_ids: ids that end a turn; used where a template's `{% generation %}` block stops just before
            them. Defaults to the tokenizer's `eos_token_id`; pass the target's list where its turns end otherwise.
        vocab_size: the target's vocabulary size, the bound of given ids. Defaults to the tokenizer's.
        report: filled in with what was kept, cut and dropped; also logged at level INFO.

    Raises:
        ValueError: a row is malformed (the message names it), the chat template cannot be used, or nothing is left.
    """
    if max_length < 2:
        raise ValueError(f"max_length is {max_length}, expected at least 2 tokens: one to read, one to predict.")
    report = DatasetReport() if report is None else report
    encoder = _RowEncoder(tokenizer, eos_token_ids, len(tokenizer) if vocab_size is None else vocab_size)

    chunks: list[Dataset] = []
    kept_ids: list[list[int]] = []
    kept_labels: list[list[int]] = []
    for index, row in enumerate(rows):
        report.rows_in += 1
        try:
            input_ids, labels = encoder(row)
        except ValueError as error:
            raise ValueError(f"Row {index}: {error}") from error

        kept_assistant = _count_assistant(labels[:max_length])
        all_assistant = kept_assistant + _count_assistant(labels[max_length:])
        if kept_assistant == 0:
            reason = "no assistant token" if all_assistant == 0 else f"no assistant token in the first {max_length}"
            report.dropped[reason] = report.dropped.get(reason, 0) + 1
            continue
        report.rows_kept += 1
        report.answers_truncated += kept_assistant < all_assistant
        report.tokens += min(len(input_ids), max_length)
        report.assistant_tokens += kept_assistant
        kept_ids.append(input_ids[:max_length])
        kept_labels.append(labels[:max_length])
        if len(kept_ids) == _ROWS_PER_CHUNK:
            chunks.append(_to_arrow(kept_ids, kept_labels))
            kept_ids, kept_labels = [], []
    if kept_ids:
        chunks.append(_to_arrow(kept_ids, kept_labels))
    if not chunks:
        reasons = ", ".join(f"{reason}: {number}" for reason, number in report.dropped.items()) or "no row was given"
        raise ValueError(
            f"None of {report.rows_in} rows can be trained on ({reasons}): pass rows with assistant answers and a "
            f"max_length above their prompts."
        )
    logger.info("Prepared the training data.\n%s", report)
    return concatenate_datasets(chunks)


def encode_prompt(prompt: str | Messages, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a prompt as the target sees it: chat template plus generation prompt; a string is one user turn.

    Raises:
        ValueError: the prompt is neither, or the tokenizer's chat template is missing or refuses it.
    """
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    _check_messages(prompt, "prompt")
    text = _render(prompt, tokenizer, add_generation_prompt=True)
    # The template writes the special tokens itself; a tokenizer that adds them again would double BOS.
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def sequence_lengths(dataset: Dataset) -> list[int]:
    """Length of every row of a prepared dataset, in tokens and in the dataset's order."""
    lengths: list[int] = []
    for batch in dataset.select_columns("input_ids").iter(batch_size=_ROWS_PER_CHUNK):
        lengths.extend(len(ids) for ids in batch["input_ids"])
    return lengths


def _to_arrow(input_ids: list[list[int]], labels: list[list[int]]) -> Dataset:
    int_list = SequenceFeature(Value("int32"))
    return Dataset.from_dict(
        {"input_ids": input_ids, "labels": labels}, features=Features({"input_ids": int_list, "labels": int_list})
    )


def _count_assistant(labels: list[int]) -> int:
    return len(labels) - labels.count(IGNORE_INDEX)


class _RowEncoder:
    """Turns one row into (input_ids, labels), both of the row's full length."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, eos_token_ids: Sequence[int] | None, vocab_size: int
    ) -> None:
        if eos_token_ids is None:
            eos_token_ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.tokenizer = tokenizer
        self.eos_token_ids = frozenset(eos_token_ids)
        self.vocab_size = vocab_size

    def __call__(self, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        # A dataset of mixed kinds fills the columns that a row lacks with None.
        given = {key for key, value in row.items() if value is not None}
        if {"input_ids", "labels"} <= given:
            return self._tokenised(row["input_ids"], row["labels"])
        if {"prompt", "answer_ids"} <= given:
            return self._answered(row["prompt"], row["answer_ids"])
        if "messages" in given:
            return self._conversation(row["messages"])
        raise ValueError(
            f"it has the fields {sorted(given)}, expected 'messages', or 'prompt' and 'answer_ids', or 'input_ids' "
            f"and 'labels'."
        )

    def _tokenised(self, input_ids: Sequence[int], labels: Sequence[int]) -> tuple[list[int], list[int]]:
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

    def _answered(self, prompt: str | Messages, answer_ids: Sequence[int]) -> tuple[list[int], list[int]]:
        answer = self._check_ids(answer_ids, "answer_ids")
        prompt_ids = encode_prompt(prompt, self.tokenizer)
        return prompt_ids + answer, [IGNORE_INDEX] * len(prompt_ids) + answer

    def _conversation(self, messages: Messages) -> tuple[list[int], list[int]]:
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"'messages' need a fast tokenizer to find the assistant's tokens, got a slow one "
                f"({type(self.tokenizer).__name__}): load a fast one or pass 'prompt' and 'answer_ids'."
            )
        _check_messages(messages, "messages")
        text, spans = _render_with_assistant_spans(messages, self.tokenizer)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        input_ids = encoded["input_ids"]
        labels = [IGNORE_INDEX] * len(input_ids)
        for first, last in _token_spans(spans, encoded["offset_mapping"]):
            last = self._end_of_turn(input_ids, first, last)
            labels[first:last] = input_ids[first:last]
        return input_ids, labels

    def _end_of_turn(self, input_ids: list[int], first: int, last: int) -> int:
        """Where the turn [first, last) really ends: behind its end-of-turn token, before the template's line break."""
        stripped = last
        while stripped > first and not self.tokenizer.decode([input_ids[stripped - 1]]).strip():
            stripped -= 1
        if stripped > first and input_ids[stripped - 1] in self.eos_token_ids:
            return stripped
        if last < len(input_ids) and input_ids[last] in self.eos_token_ids:
            return last + 1  # white space before it is the assistant's own
        return stripped

    def _check_ids(self, ids: Sequence[int], name: str) -> list[int]:
        ids = _int_list(ids, name)
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ValueError(
                f"{name} span {min(ids)} to {max(ids)}, expected ids from 0 to {self.vocab_size - 1}: they belong to "
                f"another tokenizer than the one given."
            )
        return ids


def _int_list(values: Any, name: str) -> list[int]:
    values = values.tolist() if hasattr(values, "tolist") else list(values)
    if not all(type(value) is int for value in values):
        raise ValueError(f"{name} holds values that are not integers, expected a flat list of token ids.")
    return values


def _check_messages(messages: Any, name: str) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"'{name}' is {messages!r:.80}, expected a non-empty list of messages with role and content.")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise ValueError(f"'{name}' holds {message!r:.80}, expected a message with a role and a content.")


def _render(messages: Messages, tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        raise ValueError(f"the tokenizer's chat template refuses the messages: {error}") from error


def _render_with_assistant_spans(
    messages: Messages, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation and the character spans [start, end) that the assistant wrote."""
    template = tokenizer.get_chat_template()
    if _GENERATION_MARKER.search(template):
        # `apply_chat_template(return_assistant_tokens_mask=True)` reads the same spans but labels everything up to the
        # end of the text when the last character of a span belongs to no token, which tokenizers that trim white
        # space from their offsets produce. So the spans are taken here and mapped to tokens by `_token_spans`.
        texts, spans = render_jinja_template(
            [messages],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
        return texts[0], spans[0]

    text = _render(messages, tokenizer, add_generation_prompt=False)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if index == 0:
            raise ValueError("its first message is the assistant's, expected a user's or system's message before it.")
        before = _render(messages[:index], tokenizer, add_generation_prompt=True)
        after = _render(messages[: index + 1], tokenizer, add_generation_prompt=False)
        if not (after.startswith(before) and text.startswith(after)):
            raise ValueError(
                f"the chat template renders messages 0 to {index} differently inside the whole conversation, so the "
                f"assistant's text cannot be found: add {{% generation %}} markers to the template, or split the "
                f"conversation into rows of 'prompt' and 'answer_ids'."
            )
        spans.append((len(before), len(after)))
    return text, spans


def _token_spans(spans: Sequence[tuple[int, int]], offsets: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Token spans [first, last) of character spans [start, end), both in order.

    A token belongs to a span if it shares a character with it. Tokens between its first and last one belong to it too:
    trimmed white space has an empty offset (x, x), x being the end of the untrimmed one, and shares no character.
    """
    token = 0
    for start, end in spans:
        while token < len(offsets) and offsets[token][1] <= start:
            token += 1
        first = token
        while token < len(offsets) and (offsets[token][0] < end or offsets[token] == (end, end)):
            token += 1
        yield first, token
