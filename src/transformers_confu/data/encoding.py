"""One row of text or ids as token ids and labels, whatever kind of row it is; see `prepare_dataset` for the kinds."""

import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from datasets import Features, List, Value
from transformers import PreTrainedTokenizerBase

from . import chat_template
from .chat_template import TEMPLATE_FIELDS, ChatTemplate, Messages, check_messages, encode_prompt


IGNORE_INDEX = -100

FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "prompt_hash": Value("string"),
        "is_first": Value("bool"),  # of the rows made of one given row
        "is_cut": Value("bool"),
    }
)

# As it runs, whatever is written to the files later.
_CODE = [Path(file).read_text(encoding="utf-8") for file in (__file__, chat_template.__file__)]

Encoded = tuple[list[int], list[int]]  # input_ids and labels


class MalformedRow(ValueError):
    """A row that cannot be trained on; the message names it."""


def prompt_hash(text: str) -> str:
    """Hash of a conversation's first user turn; case, kinds of white space and of equal characters do not matter."""
    normalised = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return hashlib.blake2b(normalised.encode(), digest_size=8).hexdigest()


@dataclass
class RowEncoder:
    """Turns a batch of given rows into prepared ones; several processes work on copies of it."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int
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
            *(self.max_length, self.vocab_size, self.made_by),
            transformers.__version__,
            *_CODE,
        )
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def __call__(self, batch: Mapping[str, list[Any]], indices: list[int], name: str) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {column: [] for column in FEATURES}
        for place, index in enumerate(indices):
            # Arrow fills the entries that a row lacks with None.
            row = {column: values[place] for column, values in batch.items() if values[place] is not None}
            try:
                encoded, hashed_prompt = self._encode(row), self._prompt_hash(row)
            except ValueError as error:
                raise MalformedRow(f"Row {index}{f' of {name}' if name else ''}: {error}") from error
            is_first = True
            for input_ids, labels in encoded:
                lost = [label for label in labels[self.max_length :] if label != IGNORE_INDEX]
                input_ids, labels = input_ids[: self.max_length], labels[: self.max_length]
                if labels.count(IGNORE_INDEX) < len(labels):
                    prepared = (input_ids, labels, hashed_prompt, is_first, bool(lost))
                    for column, value in zip(columns.values(), prepared, strict=True):  # in the order of `FEATURES`
                        column.append(value)
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
        if {"prompt", "completion"} <= row.keys():
            messages = _as_messages(row["prompt"], "user") + _as_messages(row["completion"], "assistant")
            return self._conversation(messages, template_options)
        if row.keys() & {"prompt", "turns", "conversations"}:
            raise ValueError(
                "it holds prompts without 'answer_ids': a draft learns from the target's own answers, so let the "
                "target answer them first (`regenerate`, or `regenerate_served` through a server; `build_prompts` "
                "reads ShareGPT's 'conversations')."
            )
        raise ValueError(
            f"it has the fields {sorted(row)}, expected 'messages', or 'prompt' and 'answer_ids', or 'input_ids' "
            f"and 'labels'."
        )

    def _tokenised(self, input_ids: Any, labels: Any) -> Encoded:
        input_ids, labels = self._check_ids(input_ids, "input_ids"), _int_list(labels, "labels")
        if len(input_ids) != len(labels):
            raise ValueError(f"it has {len(input_ids)} input_ids and {len(labels)} labels, expected as many of both.")
        if wrong := [place for place, label in enumerate(labels) if label not in (IGNORE_INDEX, input_ids[place])]:
            raise ValueError(
                f"label {labels[wrong[0]]} at position {wrong[0]} is neither {IGNORE_INDEX} nor the id of that "
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
                "after the target was trained again: let the target answer anew, or allow answers of other targets."
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
            for first, last in spans:
                labels[first:last] = input_ids[first:last]
            rows.append((input_ids, labels))
        return rows

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


def _as_messages(said: str | Messages, role: str) -> Messages:
    return [{"role": role, "content": said}] if isinstance(said, str) else list(said)


def _int_list(values: Any, name: str) -> list[int]:
    if not isinstance(values, Sequence) or not all(type(value) is int for value in values):
        raise ValueError(f"{name} is {values!r:.80}, which are not integers; expected a flat list of token ids.")
    return list(values)
