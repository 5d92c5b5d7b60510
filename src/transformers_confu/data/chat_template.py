"""Conversations as the target sees them: checked messages, their token ids, and where the assistant wrote."""

import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase


# Some templates print today's date. Here they always print this one: data that changed at midnight could not be
# prepared twice alike, and an interrupted run could not be resumed the next day.
TEMPLATE_DATE = datetime(2026, 1, 1)

# Fields of a row that say how its messages are rendered.
TEMPLATE_FIELDS = ("tools", "chat_template_kwargs")

_DATE_CALL = re.compile(r"""strftime_now\(\s*("[^"]*"|'[^']*')\s*\)""")
_NOT_OPTIONS = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"kwargs"}

Messages = list[dict[str, Any]]
Span = tuple[int, int]  # [start, end), of characters or tokens


def check_messages(messages: Any, name: str = "messages") -> Messages:
    """
    Messages as templates expect them: content is text (text parts are joined), and no key holds None, neither Arrow's
    for a key that only other rows have, nor the `"content": null` of a message that only calls tools. ValueError
    where the row's field `name` holds something else.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"'{name}' is {messages!r:.80}, expected a non-empty list of messages with role and content.")
    checked = []
    for message in messages:
        given = without_nulls(message) if isinstance(message, Mapping) else {}
        if not isinstance(given.get("role"), str) or not ("content" in given or given.get("tool_calls")):
            raise ValueError(f"'{name}' holds {message!r:.80}, expected a message with a role and a content.")
        if given["role"] in ("human", "gpt"):
            raise ValueError(
                f"'{name}' holds the role {given['role']!r}, expected roles such as 'user' and 'assistant': rename it."
            )
        if "content" in given:
            given["content"] = check_content(given["content"], name)
        checked.append(given)
    return checked


def check_content(content: Any, name: str) -> str:
    """The text of a message or turn, which may come in parts of type "text"; `name` is its field, for errors."""
    if isinstance(content, list):
        if other := [part for part in content if not isinstance(part, Mapping) or part.get("type") != "text"]:
            raise ValueError(f"'{name}' holds the content part {other[0]!r:.80}, expected parts of type 'text' only.")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(f"'{name}' holds the content {content!r:.80}, expected text or a list of text parts.")
    return content


def without_nulls(value: Any) -> Any:
    """The value without entries of None, at any depth: Arrow adds them where other rows have an entry."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def encode_prompt(
    prompt: str | Messages,
    tokenizer: PreTrainedTokenizerBase,
    tools: Sequence[Any] | str | None = None,
    chat_template_kwargs: Mapping[str, Any] | str | None = None,
) -> list[int]:
    """
    Token ids of a prompt, one user's turn or messages, as the target sees it, with the chat template's generation
    prompt; `tools` and `chat_template_kwargs` as in the rows of `prepare_dataset`.
    """
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return ChatTemplate(tokenizer, tools, chat_template_kwargs).encode(check_messages(prompt, "prompt"))


class ChatTemplate:
    """A tokenizer's chat template with the options of one row: tools (JSON schemas) and variables, or both as JSON."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tools: Sequence[Any] | str | None = None,
        options: Mapping[str, Any] | str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.tools = _parsed(tools, "tools", list) or None
        self.options = _parsed(options, "chat_template_kwargs", dict) or {}
        if reserved := sorted(_NOT_OPTIONS & self.options.keys()):
            raise ValueError(
                f"'chat_template_kwargs' names {', '.join(reserved)}, which is not for the template to decide: leave "
                "it out."
            )
        template = tokenizer.get_chat_template(tools=self.tools)
        if "strftime_now" in template:
            self.options["chat_template"] = _DATE_CALL.sub(
                lambda call: repr(TEMPLATE_DATE.strftime(call[1][1:-1])), template
            )

    def encode(self, messages: Messages) -> list[int]:
        """Ids of a prompt, up to where the assistant begins to write."""
        return self._apply(messages, tokenize=True, return_dict=True, add_generation_prompt=True)["input_ids"]

    def label(self, messages: Messages) -> list[tuple[list[int], list[Span]]]:
        """
        Ids of a conversation, and the spans of them that the assistant wrote.

        One such pair, or one for each answer if the template renders an earlier answer otherwise than the newest.
        A span begins behind the generation prompt and ends where the template's text for the answer does, without the
        line break that many put behind the end of a turn: the target does not write it.
        """
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(
                f"'messages' need a fast tokenizer to find the assistant's tokens, got {type(self.tokenizer).__name__}"
                ": load a fast one, or pass 'prompt' and 'answer_ids'."
            )
        if messages[0]["role"] == "assistant":
            raise ValueError("its first message is the assistant's, expected a user's or system's message before it.")
        text = self._apply(messages, tokenize=False)
        self._check_tool_calls(messages, text)
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        spans, is_one_text = [], True
        for index in answers:
            before = self._apply(messages[:index], tokenize=False, add_generation_prompt=True)
            after = self._apply(messages[: index + 1], tokenize=False)
            if not after.startswith(before):
                raise ValueError(
                    f"the chat template's generation prompt behind messages 0 to {index - 1} is not what it renders "
                    f"before message {index}, so the assistant's text cannot be found: pass rows of 'prompt' and "
                    "'answer_ids'."
                )
            spans.append((len(before), len(before) + len(after[len(before) :].rstrip())))
            is_one_text &= text.startswith(after)
        if is_one_text:
            return [self._encode_spans(messages, spans)]
        return [self._encode_spans(messages[: index + 1], [span]) for index, span in zip(answers, spans, strict=True)]

    def _check_tool_calls(self, messages: Messages, text: str) -> None:
        if any(message["role"] == "assistant" and "tool_calls" in message for message in messages):
            without = [
                {"content": ""} | {k: v for k, v in message.items() if k != "tool_calls"} for message in messages
            ]
            if self._apply(without, tokenize=False) == text:
                raise ValueError(
                    "the tokenizer's chat template leaves 'tool_calls' out, so the draft would learn empty answers: "
                    "use a template with tools, or leave such rows out."
                )

    def _apply(self, messages: Messages, **settings: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(messages, tools=self.tools, **self.options, **settings)
        # Whatever a template does with an entry of an unexpected kind; its text is the user's or the model author's.
        except (TemplateError, TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(
                f"the tokenizer's chat template refuses the messages: {error or type(error).__name__}"
            ) from error

    def _encode_spans(self, messages: Messages, spans: Sequence[Span]) -> tuple[list[int], list[Span]]:
        encoded = self._apply(
            messages, tokenize=True, return_dict=True, tokenizer_kwargs={"return_offsets_mapping": True}
        )
        return encoded["input_ids"], list(_token_spans(spans, encoded["offset_mapping"]))


def _parsed(value: Any, name: str, kind: type) -> Any:
    """A list or object of a row, from JSON or as Arrow returns it, which fills it with nulls."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"'{name}' is {value!r:.80}, which is not valid JSON ({error}).") from error
    else:
        value = without_nulls(value)
    if value is not None and not isinstance(value, kind):
        expected = "a list of JSON schemas" if kind is list else "an object of the template's options"
        raise ValueError(f"'{name}' is {value!r:.80}, expected {expected}, or that as JSON.")
    return value


def _token_spans(spans: Sequence[Span], offsets: Sequence[tuple[int, int]]) -> Iterator[Span]:
    """
    Spans of tokens for spans of characters, both in order: of all tokens from the first to the last that share a
    character with it. (Between them trimmed white space may have an empty offset, and shares none.)
    """
    token = 0
    for start, end in spans:
        while token < len(offsets) and offsets[token][1] <= start:
            token += 1
        first = token
        while start < end and token < len(offsets) and offsets[token][0] < end:
            token += 1
        yield first, token
