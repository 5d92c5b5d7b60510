"""Conversations on their way to answers: planned, answered turn by turn, written as one row each, and gone on with."""

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..common.answer_text import answer_text
from ..common.files import differences
from ..common.jsonl import JsonLines
from ..common.option_files import option
from .chat_template import TEMPLATE_FIELDS, Messages, check_messages, encode_prompt


# What a row of prompts hands on to its answers: how it is rendered, and where it is from.
_HANDED_ON = (*TEMPLATE_FIELDS, "source", "license", "category")


class Conversation:
    """
    A row of prompts and how far it is answered.

    The row holds `id` and either `prompt`, one user turn or messages, or `turns`, user turns that are answered one
    after the other, with a `system` message if wanted; and perhaps what is handed on.
    """

    def __init__(self, row: Mapping[str, Any], temperature: float) -> None:
        given = {name: value for name, value in row.items() if value is not None}
        if not isinstance(given.get("id"), str | int) or ("prompt" in given) == ("turns" in given):
            raise ValueError(f"it has the fields {sorted(given)}, expected 'id' and either 'prompt' or 'turns'.")
        turns = given.get("turns", [given.get("prompt")])
        if "turns" in given and not (
            isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns)
        ):
            raise ValueError(f"'turns' is {turns!r:.80}, expected a non-empty list of the user's turns as strings.")
        system = [{"role": "system", "content": given["system"]}] if given.get("system") else []
        first = [{"role": "user", "content": turns[0]}] if isinstance(turns[0], str) else turns[0]
        self.id: str | int = given["id"]
        self.temperature = float(temperature)
        self.messages: Messages = system + check_messages(first, "prompt")
        self.asked = len(self.messages)  # messages before the first answer
        self.waiting: list[str] = turns[1:]
        self.turns = len(turns)
        self.prompt_ids: list[list[int]] = []
        self.answer_ids: list[list[int]] = []
        self.finished = True
        self.is_retokenized = False
        self.given = {name: given[name] for name in _HANDED_ON if name in given}

    def next_prompt(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Ids of what the target is to answer next."""
        try:
            return encode_prompt(self.messages, tokenizer, *(self.given.get(name) for name in TEMPLATE_FIELDS))
        except ValueError as error:
            raise ValueError(f"Prompt {self.id!r}: {error}") from error

    def add(
        self, prompt_ids: list[int], answer_ids: list[int], finished: bool, tokenizer: PreTrainedTokenizerBase
    ) -> bool:
        """
        Take an answer, whose last token is the one that ended it if it is finished. Whether there is a further turn:
        none follows an answer that was cut or is empty.
        """
        text = answer_text(tokenizer, answer_ids, answer_ids[-1:] if finished else ())
        self.prompt_ids.append(prompt_ids)
        self.answer_ids.append(answer_ids)
        self.messages.append({"role": "assistant", "content": text})
        self.finished = finished
        if not (finished and text.strip() and self.waiting):
            return False
        self.messages.append({"role": "user", "content": self.waiting.pop(0)})
        return True

    def row(self, made_with: Mapping[str, Any]) -> dict[str, Any]:
        """The answered row, which `prepare_dataset` takes as it is."""
        messages = self.messages
        if messages[-1]["role"] != "assistant":  # a last turn that could not be answered
            messages = messages[:-1]
        return {
            "id": self.id,
            "messages": messages,
            "prompt_ids": self.prompt_ids,
            "answer_ids": self.answer_ids,
            "temperature": self.temperature,
            "finished": self.finished,
            "made_with": dict(made_with),
            **({"retokenized": True} if self.is_retokenized else {}),
            **self.given,
        }

    def is_answered_by(self, row: Mapping[str, Any]) -> bool:
        """Whether a row of a file answers this conversation, which is still unanswered."""
        messages = row.get("messages") or []
        asked = [message["content"] for message in messages[self.asked :] if message["role"] == "user"]
        return (
            row.get("id") == self.id
            and row.get("temperature") == self.temperature
            and messages[: self.asked] == self.messages
            and asked == self.waiting[: len(asked)]
            and all(row.get(name) == self.given.get(name) for name in TEMPLATE_FIELDS)
        )


@dataclass
class RegenerationReport:
    """What one call of `regenerate` or `regenerate_served` did, in conversations; a single prompt is one."""

    prompts: int = 0  # given
    too_long: int = 0  # skipped: their first prompt exceeds `max_prompt_length`
    resumed: int = 0  # found in the output of an earlier call
    written: int = 0  # by this call
    unfinished: int = 0  # written, and their last answer was cut at `max_new_tokens`
    stopped: int = 0  # written, and ended before their last turn
    retokenized: int = 0  # written, with ids made from text, since the server returned none
    refused: Counter = field(default_factory=Counter)  # by the server, by its reason
    tokens: int = 0  # of the answers written
    seconds: float = 0.0  # from the start to the last written answer
    _start: float = field(default_factory=time.perf_counter, repr=False)

    def count(self, conversation: Conversation) -> None:
        self.written += 1
        self.unfinished += not conversation.finished
        self.stopped += len(conversation.answer_ids) < conversation.turns
        self.tokens += sum(map(len, conversation.answer_ids))
        self.retokenized += conversation.is_retokenized
        self.seconds = time.perf_counter() - self._start

    def __str__(self) -> str:
        rate = self.tokens / self.seconds if self.seconds else 0.0
        lines = [
            f"prompts: {self.prompts:,}, of which too long: {self.too_long:,}, answered before: {self.resumed:,}",
            f"answers written: {self.written:,} ({self.tokens:,} tokens, {rate:,.0f} tokens/s), of which cut at "
            f"the maximum length: {self.unfinished:,}, ended before their last turn: {self.stopped:,}, with ids "
            f"made from text, which may not be those the target chose: {self.retokenized:,}",
            *(f"prompts refused ({reason}): {number:,}" for reason, number in self.refused.items()),
        ]
        return "\n".join(lines)


class AnswerFile:
    r"""
    A JSONL file of answers that a call goes on with: what is not answered yet, and what it adds.

    Args:
        path: The `.jsonl` file; made when the first answer is written.
        prompts: Rows, see [`Conversation`].
        temperatures: The prompts take them in turn.
        made_with: Target and settings. The same target may be called by another `target_name`: its hash counts.

    Raises:
        ValueError: a temperature or a row is invalid, or the file holds an answer that this call would not write.
    """

    def __init__(
        self,
        path: str | Path,
        prompts: Iterable[Mapping[str, Any]],
        temperatures: Sequence[float],
        made_with: Mapping[str, Any],
    ) -> None:
        if Path(path).suffix != ".jsonl":
            raise ValueError(f"The output is {path}, expected a .jsonl file; compress it when it is complete.")
        if not temperatures or min(temperatures) < 0:
            raise ValueError(f"temperatures is {list(temperatures)}, expected one or more numbers of 0 or above.")
        self._file, self._made_with = JsonLines(path), made_with
        unanswered: dict[str | int, Conversation] = {}
        for index, row in enumerate(prompts):
            try:
                conversation = Conversation(row, temperatures[index % len(temperatures)])
            except ValueError as error:
                raise ValueError(f"Row {index}: {error}") from error
            if conversation.id in unanswered:
                raise ValueError(f"Row {index} has the id {conversation.id!r} of an earlier row: make the ids unique.")
            unanswered[conversation.id] = conversation
        self.report = RegenerationReport(prompts=len(unanswered))
        for number, row in self._file.rows():
            answered = unanswered.pop(row.get("id"), None)
            if answered is None or not answered.is_answered_by(row):
                raise ValueError(
                    f"{path}, line {number} is no answer (id {row.get('id')!r}) that this call would write: repeat "
                    "the earlier call with its prompts and settings, or choose another output."
                )
            before = row.get("made_with") or {}
            if changed := differences({**before, "target_name": ""}, {**made_with, "target_name": ""}):
                raise ValueError(
                    f"{path}, line {number} was made with other settings ({changed}): repeat the earlier call with "
                    "its target and settings, or choose another output."
                )
        self.unanswered = list(unanswered.values())
        self.report.resumed = self.report.prompts - len(unanswered)

    def write(self, conversations: Sequence[Conversation]) -> None:
        """Append answered conversations."""
        self._file.append(conversation.row(self._made_with) for conversation in conversations)
        for conversation in conversations:
            self.report.count(conversation)


@dataclass(kw_only=True)
class AnswerArguments:
    """Arguments that both commands share."""

    prompts: str = option("Prompts: a file, folder or Hub dataset of rows with 'id' and 'prompt', or 'turns'.", ...)
    output: str = option("JSONL file of the answers; a run that was interrupted is resumed.", ...)
    max_new_tokens: int = option("Longest answer, in tokens.", 512)
    max_prompt_length: int = option("Longer prompts (in tokens) are skipped.", 1024)
    temperatures: list[float] = option("Temperatures the prompts take in turn; 0 is greedy.", lambda: [0.0, 0.8])
    seed: int = option("Seed of the sampling.", 0)
