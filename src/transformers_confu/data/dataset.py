"""Training data: rows of text or ids in, token ids with assistant labels out.

Every row becomes `input_ids` and `labels` of equal length. A label equals the id at the *same* position where the
assistant wrote that token and is -100 elsewhere (TRL's convention: labels are not shifted; the loss shifts them).
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.compute as pc
from aiohttp import ClientError
from datasets import Dataset, Features, Value, concatenate_datasets, load_dataset, load_from_disk
from datasets import Sequence as SequenceFeature
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging
from transformers.utils.chat_template_utils import render_jinja_template

from ..common.jsonl import parse_json_object, read_jsonl


logger = logging.get_logger(__name__)

IGNORE_INDEX = -100

# Rows held as Python lists before they are packed into Arrow; bounds the peak memory of a large corpus.
_ROWS_PER_CHUNK = 1000

_GENERATION_MARKER = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

Messages = list[dict[str, Any]]
Encoded = tuple[Any, Any]  # input_ids and labels, lists or arrays of int
Span = tuple[int, int]  # of characters, [start, end)


@dataclass
class DatasetReport:
    """What `prepare_dataset` kept, cut and dropped.

    Attributes:
        rows_in: rows read.
        rows_kept: rows of the prepared dataset.
        dropped: number of dropped rows by reason.
        rows_split_off: rows made of earlier answers of a conversation, because the chat template renders an earlier
            turn otherwise than the newest one; each is then a row of its own, and counted here beside `rows_in`.
        rows_merged: rows that became one with the row of the conversation's next turn.
        answers_truncated: kept rows that lost at least one assistant token to `max_length`.
        tokens: tokens of the kept rows.
        assistant_tokens: tokens of the kept rows whose label is not -100.
    """

    rows_in: int = 0
    rows_kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    rows_split_off: int = 0
    rows_merged: int = 0
    answers_truncated: int = 0
    tokens: int = 0
    assistant_tokens: int = 0

    def __str__(self) -> str:
        rows = self.rows_in + self.rows_split_off - self.rows_merged
        lines = [f"rows: {self.rows_kept:,} kept of {rows:,}"]
        lines += [f"  dropped, {reason}: {number:,}" for reason, number in sorted(self.dropped.items())]
        if self.rows_split_off:
            lines.append(f"  earlier answers of conversations that became rows of their own: {self.rows_split_off:,}")
        if self.rows_merged:
            lines.append(f"  earlier turns that are part of the row of the next: {self.rows_merged:,}")
        lines.append(f"tokens: {self.tokens:,}, of which the assistant wrote {self.assistant_tokens:,}")
        lines.append(f"answers cut at the maximum length: {self.answers_truncated:,}")
        return "\n".join(lines)


def load_rows(source: str | Path) -> Iterable[Mapping[str, Any]]:
    """Rows from wherever they are: a file, a folder, an address or a dataset of the Hub.

    Args:
        source: one of

            - a `.jsonl` or `.jsonl.gz` file, read by `load_jsonl`,
            - a `.json` file (a list of objects, or one object per line), or a `.csv` or `.parquet` file,
            - the https address of a `.jsonl` or `.json` file,
            - a folder that `Dataset.save_to_disk` wrote, or one of data files,
            - the id of a Hub dataset, with a split if it is not "train" and a configuration if it has several:
              `"HuggingFaceH4/ultrachat_200k:train_sft"`, `"openai/gsm8k:main:train"`.

    Raises:
        ValueError: there is no such file, folder, address or dataset, or it cannot be read.
    """
    path = Path(source)
    try:
        if str(source).startswith(("https://", "http://")):
            with fsspec.open(str(source), "rb") as file:
                return _parse_json_rows(file.read(), path)
        if path.name.endswith((".jsonl", ".jsonl.gz")):
            return load_jsonl(path)
        if path.suffix == ".json":
            return _parse_json_rows(path.read_bytes(), path)
        if path.is_file():
            return load_dataset(path.suffix.removeprefix("."), data_files=str(path), split="train")
        if path.is_dir():
            is_saved = (path / "dataset_info.json").exists()
            return load_from_disk(path) if is_saved else load_dataset(str(path), split="train")
        name, *rest = str(source).split(":")
        *configuration, split = rest or ["train"]
        return load_dataset(name, *configuration, split=split)
    except FileNotFoundError as error:
        raise ValueError(
            f"There is no file, folder, address or Hub dataset {source}, or it is out of reach: "
            f"{error.__cause__ or error}"
        ) from error
    except (OSError, ValueError, RuntimeError, TypeError, ClientError) as error:
        raise ValueError(
            f"{source} cannot be read as a file, folder, address or Hub dataset (id, id:split or "
            f"id:configuration:split): {error}"
        ) from error


def _parse_json_rows(content: bytes, path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON list, or of the lines of a JSONL file."""
    if content.lstrip()[:1] == b"[":
        rows = json.loads(content)
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{path} holds a list of other things than objects.")
        return rows
    lines = enumerate(content.splitlines(), start=1)
    return [parse_json_object(line, path, number) for number, line in lines if line.strip()]


def load_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a `.jsonl` or `.jsonl.gz` file, read whole, so that a bad line shows before any row is worked on."""
    return list(read_jsonl(path))


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
      end-of-turn token included, the line break a template puts behind it not. Templates need no `{% generation %}`
      markers. Where a template renders an earlier turn otherwise than the newest (Qwen3's drops its reasoning), each
      answer becomes a row of its own, with the text before it as the target saw it.
    - `{"prompt": str | messages, "answer_ids": [int, ...]}`: the prompt rendered with the generation prompt (a string
      is one user turn), then the ids exactly as given. They are never decoded and tokenised again, since that
      would change the tokens the target really chose.
    - `{"input_ids": [int, ...], "labels": [int, ...]}`: passed through after a check.

    Turns of one conversation (answered rows with ids `c/0`, `c/1`, ..., as `next_prompt` numbers them) become one row
    where the prompt of a turn begins with just the tokens of the turn before, its answer included: the same lessons
    for fewer tokens. Elsewhere, as where a template drops earlier reasoning, they stay rows of their own. Such rows
    come last.

    A row may also hold `tools` (a list of JSON schemas, or that list as JSON) and `chat_template_kwargs` (such as
    `{"enable_thinking": false}`), which go to the chat template: give those that the target answers with.

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

    writer = _ArrowWriter(max_length, report)
    pending: dict[str, Encoded] = {}  # the newest turn of each conversation, as arrays
    for index, row in enumerate(rows):
        report.rows_in += 1
        try:
            encoded = encoder(row)
        except ValueError as error:
            raise ValueError(f"Row {index}: {error}") from error
        report.rows_split_off += len(encoded) - 1
        conversation = _conversation_of(row)
        if conversation is None:
            writer.add(encoded)
            continue
        turn = (np.array(encoded[0][0], dtype=np.int32), np.array(encoded[0][1], dtype=np.int32))
        if (before := pending.pop(conversation, None)) is not None:
            length = len(before[0])
            if np.array_equal(turn[0][:length], before[0]):
                turn[1][:length] = before[1]
                report.rows_merged += 1
            else:
                writer.add([before])
        pending[conversation] = turn
    for turn in pending.values():
        writer.add([turn])
    chunks = writer.finish()
    if not chunks:
        reasons = ", ".join(f"{reason}: {number}" for reason, number in report.dropped.items()) or "no row was given"
        raise ValueError(
            f"None of {report.rows_in} rows can be trained on ({reasons}): pass rows with assistant answers and a "
            f"max_length above their prompts."
        )
    logger.info("Prepared the training data.\n%s", report)
    return concatenate_datasets(chunks)


def encode_prompt(
    prompt: str | Messages,
    tokenizer: PreTrainedTokenizerBase,
    tools: Sequence[Any] | str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a prompt as the target sees it: chat template plus generation prompt; a string is one user turn.

    Args:
        prompt: a user's turn, or messages.
        tokenizer: with a chat template.
        tools, chat_template_kwargs: as in the rows of `prepare_dataset`.

    Raises:
        ValueError: the prompt is neither, or the tokenizer's chat template is missing or refuses it.
    """
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    messages = _check_messages(prompt, "prompt")
    text = _ChatTemplate(tokenizer, tools, chat_template_kwargs).render(messages, add_generation_prompt=True)
    # The template writes the special tokens itself; a tokenizer that adds them again would double BOS.
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def sequence_lengths(dataset: Dataset) -> list[int]:
    """Length of every row of a prepared dataset, in tokens and in the dataset's order."""
    lengths: list[int] = []
    columns = dataset.select_columns("input_ids").with_format("arrow")
    for batch in columns.iter(batch_size=_ROWS_PER_CHUNK):
        lengths.extend(pc.list_value_length(batch["input_ids"]).to_pylist())
    return lengths


def _conversation_of(row: Mapping[str, Any]) -> str | None:
    """The conversation that an answered row is a turn of."""
    conversation, mark, turn = str(row.get("id")).rpartition("/")
    is_answered = row.get("answer_ids") is not None and row.get("prompt") is not None
    is_turn = mark and turn.isdecimal() and is_answered and not isinstance(row["prompt"], str)
    return conversation if is_turn else None


class _ArrowWriter:
    """Cuts rows to the maximum length, drops those that teach nothing, and keeps the others as Arrow tables."""

    def __init__(self, max_length: int, report: DatasetReport) -> None:
        self.max_length = max_length
        self.report = report
        self.chunks: list[Dataset] = []
        self.columns: dict[str, list[Any]] = {"input_ids": [], "labels": []}

    def add(self, rows: list[Encoded]) -> None:
        report = self.report
        for input_ids, labels in rows:
            cut = labels[: self.max_length]
            kept_assistant, all_assistant = _count_assistant(cut), _count_assistant(labels)
            if kept_assistant == 0:
                reason = "no assistant token" + (f" in the first {self.max_length}" if all_assistant else "")
                report.dropped[reason] = report.dropped.get(reason, 0) + 1
                continue
            report.rows_kept += 1
            report.answers_truncated += kept_assistant < all_assistant
            report.tokens += len(cut)
            report.assistant_tokens += kept_assistant
            self.columns["input_ids"].append(input_ids[: self.max_length])
            self.columns["labels"].append(cut)
        if len(self.columns["labels"]) >= _ROWS_PER_CHUNK:
            self._flush()

    def _flush(self) -> None:
        int_list = SequenceFeature(Value("int32"))
        features = Features({"input_ids": int_list, "labels": int_list})
        self.chunks.append(Dataset.from_dict(self.columns, features=features))
        self.columns = {"input_ids": [], "labels": []}

    def finish(self) -> list[Dataset]:
        if self.columns["labels"]:
            self._flush()
        return self.chunks


def _count_assistant(labels: Sequence[int]) -> int:
    return int(np.count_nonzero(np.asarray(labels) != IGNORE_INDEX))


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

    def __call__(self, row: Mapping[str, Any]) -> list[Encoded]:
        # A dataset of mixed kinds fills the columns that a row lacks with None.
        given = {key for key, value in row.items() if value is not None}
        template_options = (row.get("tools"), row.get("chat_template_kwargs"))
        if {"input_ids", "labels"} <= given:
            return [self._tokenised(row["input_ids"], row["labels"])]
        if {"prompt", "answer_ids"} <= given:
            return [self._answered(row["prompt"], row["answer_ids"], *template_options)]
        if "messages" in given:
            return self._conversation(row["messages"], *template_options)
        if given & {"prompt", "turns"}:
            raise ValueError(
                "it holds a prompt without 'answer_ids': a draft learns from the target's own answers, so let the "
                "target answer the prompts first (`regenerate`, or `regenerate_served` through a server)."
            )
        if "conversations" in given:
            raise ValueError(
                "it holds 'conversations' (ShareGPT's form): make prompts of them with `build_prompts` and let the "
                "target answer these, or pass 'messages' with role and content."
            )
        raise ValueError(
            f"it has the fields {sorted(given)}, expected 'messages', or 'prompt' and 'answer_ids', or 'input_ids' "
            f"and 'labels'."
        )

    def _tokenised(self, input_ids: Sequence[int], labels: Sequence[int]) -> Encoded:
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

    def _answered(self, prompt: str | Messages, answer_ids: Sequence[int], *template_options: Any) -> Encoded:
        answer = self._check_ids(answer_ids, "answer_ids")
        prompt_ids = encode_prompt(prompt, self.tokenizer, *template_options)
        return prompt_ids + answer, [IGNORE_INDEX] * len(prompt_ids) + answer

    def _conversation(self, messages: Messages, *template_options: Any) -> list[Encoded]:
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"'messages' need a fast tokenizer to find the assistant's tokens, got a slow one "
                f"({type(self.tokenizer).__name__}): load a fast one or pass 'prompt' and 'answer_ids'."
            )
        messages = _check_messages(messages, "messages")
        rows = []
        for text, spans in _ChatTemplate(self.tokenizer, *template_options).answers(messages):
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            input_ids = encoded["input_ids"]
            labels = [IGNORE_INDEX] * len(input_ids)
            for first, last in _token_spans(spans, encoded["offset_mapping"]):
                last = self._end_of_turn(input_ids, first, last)
                labels[first:last] = input_ids[first:last]
            rows.append((input_ids, labels))
        return rows

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


def _check_messages(messages: Any, name: str) -> Messages:
    """The messages, without the keys that Arrow fills with None where other rows have them."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"'{name}' is {messages!r:.80}, expected a non-empty list of messages with role and content.")
    checked = []
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise ValueError(f"'{name}' holds {message!r:.80}, expected a message with a role and a content.")
        checked.append({key: value for key, value in message.items() if value is not None or key == "content"})
    return checked


class _ChatTemplate:
    """A tokenizer's chat template with the options of one row."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tools: Sequence[Any] | str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.tools = json.loads(tools) if isinstance(tools, str) else (tools or None)
        self.options = {key: value for key, value in (chat_template_kwargs or {}).items() if value is not None}

    def render(self, messages: Messages, add_generation_prompt: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=self.tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self.options,
            )
        except TemplateError as error:
            raise ValueError(f"the tokenizer's chat template refuses the messages: {error}") from error

    def answers(self, messages: Messages) -> list[tuple[str, list[Span]]]:
        """The rendered conversation and the character spans [start, end) that the assistant wrote; or, if the
        template renders earlier turns otherwise within the whole, one such pair for each answer."""
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if 0 in answers:
            raise ValueError("its first message is the assistant's, expected a user's or system's message before it.")
        text = self.render(messages, add_generation_prompt=False)
        stages = [self.render(messages[: index + 1], add_generation_prompt=False) for index in answers]
        if all(text.startswith(stage) for stage in stages):
            return [(text, self._spans(messages, text, answers))]
        return [
            (stage, self._spans(messages[: index + 1], stage, [index])[-1:])
            for index, stage in zip(answers, stages, strict=True)
        ]

    def _spans(self, messages: Messages, text: str, answers: list[int]) -> list[Span]:
        template = self.tokenizer.get_chat_template(tools=self.tools)
        if _GENERATION_MARKER.search(template):
            # `apply_chat_template(return_assistant_tokens_mask=True)` reads the same spans but labels everything up to
            # the end of the text when the last character of a span belongs to no token, which tokenizers that trim
            # white space from their offsets produce. So the spans are taken here and mapped by `_token_spans`.
            _, spans = render_jinja_template(
                [messages],
                tools=self.tools,
                chat_template=template,
                return_assistant_tokens_mask=True,
                **{**self.tokenizer.special_tokens_map, **self.options},
            )
            return spans[0]
        spans = []
        for index in answers:
            before = self.render(messages[:index], add_generation_prompt=True)
            after = self.render(messages[: index + 1], add_generation_prompt=False)
            if not (after.startswith(before) and text.startswith(after)):
                raise ValueError(
                    f"the chat template's generation prompt behind messages 0 to {index - 1} is not what it renders "
                    f"before message {index}, so the assistant's text cannot be found: add {{% generation %}} markers "
                    f"to the template, or pass rows of 'prompt' and 'answer_ids'."
                )
            spans.append((len(before), len(after)))
        return spans


def _token_spans(spans: Sequence[Span], offsets: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
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
