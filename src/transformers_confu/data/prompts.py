"""
A set of prompts from public sources, for the target to answer.

    confu data prompts --sources paper --output prompts.jsonl

reads conversations in any of the usual forms, keeps the user's turns, drops what overlaps with evaluation questions,
what is there twice and what is too short or too long, and writes beside the prompts where each came from, under which
licence, and whom to credit. The sources that it knows by name are in `sources.yaml`.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from ..common.files import write_atomically
from ..common.option_files import option
from ..common.spec_bench import SPEC_BENCH_URL
from .chat_template import check_content
from .rows import load_rows


# Words in a row that a prompt must share with an evaluation question to count as one (GPT-3 paper, appendix C).
OVERLAP_WORDS = 13
# A shorter question counts when a prompt holds all of it, a very short one only when it is the whole turn.
_SHORT_QUESTION = 5

# Of a turn; the least applies to the first alone.
MIN_CHARACTERS = 12
MAX_CHARACTERS = 6000

_USERS = {"user", "human", "prompter"}

EVALUATION_SETS = [SPEC_BENCH_URL, "openai/gsm8k:main:test", "openai/openai_humaneval:test"]


def user_turns(row: Mapping[str, Any]) -> list[str]:
    """
    The user's turns of a row: of `messages`, of ShareGPT's `conversations`, of `turns`, or its one `prompt`,
    `question` or `instruction` (with `input` or `instances` behind it). None if it has none of them, or begins with
    an answer, so that its questions lack what they refer to.
    """
    for name in ("messages", "conversations", "prompt"):
        said = row.get(name)
        if not said or (name == "prompt" and isinstance(said, str)):
            continue
        if not isinstance(said, list) or not all(isinstance(message, Mapping) for message in said):
            raise ValueError(f"'{name}' is {said!r:.80}, expected a list of messages.")
        spoken = [
            (role, message.get("content") or message.get("value") or "")
            for message in said
            if (role := message.get("role") or message.get("from")) != "system"
        ]
        begins = spoken and spoken[0][0] in _USERS
        return [check_content(text, name) for role, text in spoken if role in _USERS] if begins else []
    if turns := row.get("turns"):
        return [check_content(turn["content"] if isinstance(turn, Mapping) else turn, "turns") for turn in turns]
    for name in ("prompt", "question", "instruction"):
        if isinstance(row.get(name), str):
            given = row.get("input") or next((instance.get("input") for instance in row.get("instances") or ()), "")
            return [row[name] + (f"\n\n{given}" if name == "instruction" and given else "")]
    return []


@dataclass(frozen=True)
class PromptSource:
    """Where prompts come from."""

    name: str  # goes into ids and the report
    data: str  # what `load_rows` reads
    license: str  # of the texts, as their publisher states it; a row's own `license` wins
    credit: str  # whom or what to name, with an address
    text: str | None = None  # the prompt of a row, with its fields in braces, where `user_turns` does not find it
    join: str = "\n"  # between the texts of a field that holds several
    where: Mapping[str, Any] = field(default_factory=dict)  # fields and values that a row must have to be taken

    def turns(self, row: Mapping[str, Any]) -> list[str]:
        """The user's turns of a row; none for a row to leave out."""
        if any(row.get(name) != value for name, value in self.where.items()):
            return []
        if self.text is None:
            return user_turns(row)
        fields = {name: self.join.join(value) if isinstance(value, list) else value for name, value in row.items()}
        return [self.text.format(**fields)]


SOURCES = {
    name: PromptSource(name, **facts)
    for name, facts in yaml.safe_load(Path(__file__).with_name("sources.yaml").read_text(encoding="utf-8")).items()
}
_OF_THE_PAPER = ["sharegpt", "ultrachat-200k"]
SETS = {"paper": _OF_THE_PAPER, "open": [name for name in SOURCES if name not in _OF_THE_PAPER]}


def find_sources(names: Iterable[str]) -> list[PromptSource]:
    """
    Sources by the names of `SETS` and `SOURCES`; anything else is data for `load_rows`, whose rows may name their
    own `source` and `license`.
    """
    members = [member for name in names for member in SETS.get(name, [name])]
    return [
        SOURCES.get(member) or PromptSource(Path(member).name.split(".")[0], member, "not stated", member)
        for member in members
    ]


class EvaluationOverlap:
    """
    Tells whether a text holds an evaluation question: any 13 words (runs of letters and digits, in lower case) in a
    row of one, or the whole of a shorter one.
    """

    def __init__(self, questions: Iterable[str]) -> None:
        self.runs: dict[int, set[str]] = {}  # by their number of words
        self.wholes: set[str] = set()
        for question in questions:
            words = _words(question)
            if len(words) < _SHORT_QUESTION:
                self.wholes.add(" ".join(words))
            else:
                length = min(len(words), OVERLAP_WORDS)
                self.runs.setdefault(length, set()).update(_runs(words, length))

    def __contains__(self, text: str) -> bool:
        words = _words(text)
        return " ".join(words) in self.wholes or any(
            run in known for length, known in self.runs.items() for run in _runs(words, length)
        )


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _runs(words: Sequence[str], length: int) -> Iterator[str]:
    return (" ".join(words[first : first + length]) for first in range(len(words) - length + 1))


@dataclass
class PromptReport:
    """What `build_prompts` took from where."""

    origins: dict[str, tuple[str, str]] = field(default_factory=dict)  # licence and credit of each source
    kept: Counter = field(default_factory=Counter)  # rows of each source that became prompts
    dropped: dict[str, Counter] = field(default_factory=dict)  # rows of each source that did not, by reason

    def __str__(self) -> str:
        """A table in Markdown, for the model card too."""
        lines = ["| source | licence | credit | prompts | left out |", "|---|---|---|---|---|"]
        for name, (license_, credit) in self.origins.items():
            reasons = ", ".join(f"{reason} {number:,}" for reason, number in self.dropped[name].most_common())
            lines.append(f"| {name} | {license_} | {credit} | {self.kept[name]:,} | {reasons} |")
        return "\n".join(lines)


def build_prompts(
    sources: Sequence[PromptSource],
    evaluation: EvaluationOverlap,
    *,
    max_prompts: int | None = None,
    max_turns: int = 4,
    seed: int = 0,
) -> tuple[list[dict[str, Any]], PromptReport]:
    """
    Prompt rows for `regenerate` and `regenerate_served`, in random order.

    A row is `{"id", "source", "license", "prompt"}`, or with `turns` in place of `prompt` where the user says more
    than one thing. A conversation ends before a turn that is empty or too long, and goes whole if its first turn is
    too short or too long, if any turn holds an evaluation question, or if another row of these sources begins with
    the same words. Answers and system messages are not taken.

    Args:
        evaluation: the questions to keep out.
        max_prompts: most rows, drawn from all that passed.
        max_turns: turns of a conversation; further ones are cut.
        seed: of the drawing and of the order.
    """
    report = PromptReport()
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    for source in sources:
        for index, row in enumerate(tqdm(load_rows(source.data), desc=source.name, unit="row")):
            try:
                turns = [turn.strip() for turn in source.turns(row)][:max_turns]
            except (ValueError, KeyError) as error:
                raise ValueError(f"Row {index} of {source.data}: {error}") from error
            name, license_ = row.get("source") or source.name, row.get("license") or source.license
            report.origins.setdefault(name, (license_, source.credit))
            dropped = report.dropped.setdefault(name, Counter())
            if reason := _reason_to_drop(turns, seen, evaluation):
                dropped[reason] += 1
                continue
            seen.add(" ".join(_words(turns[0])))
            unfit = (place for place, turn in enumerate(turns) if not turn or len(turn) > MAX_CHARACTERS)
            turns = turns[: next(unfit, None)]
            prompt = {"prompt": turns[0]} if len(turns) == 1 else {"turns": turns}
            rows.append({"id": f"{source.name}-{index:06d}", "source": name, "license": license_} | prompt)
    random.Random(seed).shuffle(rows)
    for row in rows[max_prompts:] if max_prompts is not None else ():
        report.dropped[row["source"]]["not drawn"] += 1
    rows = rows[:max_prompts]
    report.kept = Counter(row["source"] for row in rows)
    return rows, report


def _reason_to_drop(turns: list[str], seen: set[str], evaluation: EvaluationOverlap) -> str | None:
    if not turns:
        return "no prompt"
    if len(turns[0]) < MIN_CHARACTERS:
        return "too short"
    if len(turns[0]) > MAX_CHARACTERS:
        return "too long"
    if any(turn in evaluation for turn in turns):
        return "in an evaluation set"
    return "there already" if " ".join(_words(turns[0])) in seen else None


@dataclass
class PromptArguments:
    """Of the command line."""

    output: str = option("JSONL file of the prompts; its provenance goes beside it, as .md.", ...)
    sources: list[str] = option(
        "'open', 'paper', single sources of them, files or Hub datasets (id:configuration:split).", lambda: ["open"]
    )
    evaluation: list[str] = option(
        "Files or Hub datasets of questions to keep out; Spec-Bench, GSM8K's test, HumanEval.", EVALUATION_SETS.copy
    )
    max_prompts: int | None = option("Most prompts, drawn from all.")
    max_turns: int = option("User's turns of a conversation.", 4)
    seed: int = option("Seed of drawing and order.", 0)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `build_prompts` from the command line."""
    (arguments,) = HfArgumentParser(PromptArguments).parse_args_into_dataclasses(args=argv)
    output = Path(arguments.output)
    if output.suffix != ".jsonl":
        raise ValueError(f"output is {output}, expected a .jsonl file.")
    questions = [turn for source in arguments.evaluation for row in load_rows(source) for turn in user_turns(row)]
    settings = {name: getattr(arguments, name) for name in ("max_prompts", "max_turns", "seed")}
    rows, report = build_prompts(find_sources(arguments.sources), EvaluationOverlap(questions), **settings)
    provenance = (
        f"# Prompts of {output.name}\n\n{len(rows):,} prompts, seed {arguments.seed}.\n\n{report}\n\n"
        f"Left out as in an evaluation set: a turn that shares {OVERLAP_WORDS} words in a row with one of "
        f"{len(questions):,} questions, or holds a shorter one, of:\n\n"
        + "".join(f"- {name}\n" for name in arguments.evaluation)
    )
    write_atomically(output.with_suffix(".md"), provenance)
    write_atomically(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(report)
    print(f"{len(rows):,} prompts: {output}, their provenance: {output.with_suffix('.md')}")
