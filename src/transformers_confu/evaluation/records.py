"""The file of a measurement: a first line that says what is measured, then one line per answer, appended at once.

What belongs together (one question under one setting in one run, all arms) is written together, so that an
interrupted measurement never pairs answers that were made hours apart.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..common.jsonl import parse_json_object, read_lines
from .arms import Arm, Setting


logger = logging.get_logger(__name__)


@dataclass
class Rounds:
    r"""
    What the rounds of one answer did.

    Args:
        emitted (`list[int]`): Tokens of each round, trimmed at EOS and limit. What the first forward, which is
            prefill, emits is in no round.
        accepted (`list[int]`, *optional*): How many of them were drafted; not known of arms without a ConFu draft.
        tree_nodes, contemplate_rows (`int`): Rows that the target computed in rounds.
        seconds (`dict[str, float]`): prefill, draft, target, walk, compaction.
        target_cache_bytes, draft_cache_bytes, transient_cache_bytes (`int`): See `ConFuStatistics`.
    """

    emitted: list[int]
    accepted: list[int] | None = None
    tree_nodes: int = 0
    contemplate_rows: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    target_cache_bytes: int = 0
    draft_cache_bytes: int = 0
    transient_cache_bytes: int = 0


@dataclass
class Turn:
    r"""
    One answer.

    Args:
        prompt_tokens (`int`): Length of the prompt, earlier turns included.
        token_ids (`list[int]`): The answer, up to and including EOS.
        seconds (`float`): Of the whole call of `generate`, prefill included.
        rounds ([`Rounds`], *optional*): `None` for plain generation, whose every forward emits one token.
        peak_memory_bytes (`int`): Most memory in use during the call: allocated on the accelerator, or resident in
            the process on a CPU, weights included.
        prompt_hash (`str`): Of the prompt's ids: from the second turn on, prompts differ where answers did.
    """

    prompt_tokens: int
    token_ids: list[int]
    seconds: float
    rounds: Rounds | None
    peak_memory_bytes: int
    prompt_hash: str


@dataclass
class Departure:
    r"""
    Where an answer leaves that of plain generation.

    Args:
        turn, position (`int`): The first token that differs.
        gap (`float`, *optional*): How far apart the target's logits of the two tokens are in one forward over the
            common text; `None` if one text ends there, or when sampling.
    """

    turn: int
    position: int
    gap: float | None


@dataclass
class Answer:
    """One question answered by one arm in one run: a line of the file."""

    run: int
    setting: Setting
    question_id: str
    category: str
    group: str
    arm: Arm
    order: int  # place of the arm among those of this question and run
    turns: list[Turn]
    skipped_turns: int = 0  # too long for the target's context
    departure: Departure | None = None

    @property
    def unit(self) -> tuple[Setting, int, str]:
        return self.setting, self.run, self.question_id

    def to_json(self) -> dict[str, Any]:
        return {"kind": "answer", "label": self.arm.label, **asdict(self)}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "Answer":
        values = {name: value for name, value in row.items() if name not in ("kind", "label")}
        values["setting"], values["arm"] = Setting(**values["setting"]), Arm(**values["arm"])
        values["departure"] = None if values["departure"] is None else Departure(**values["departure"])
        values["turns"] = [
            Turn(**turn | {"rounds": None if turn["rounds"] is None else Rounds(**turn["rounds"])})
            for turn in values["turns"]
        ]
        return cls(**values)


class RecordFile:
    r"""
    The records on disk, to be read and, with `settings`, to be added to.

    Args:
        path (`Path`): A `.jsonl` file; with `settings`, created if it is missing, without, also a `.jsonl.gz`.
        settings (`dict`, *optional*): What is measured, under `machine` on what, and under `command` by what; a file
            of another measurement is refused. `None` takes the file as it is.
        plan (`dict[Setting, list[Arm]]`, *optional*): The arms of each setting: a file with others is refused, and an
            incomplete unit at the end is known as such and removed.

    Raises:
        ValueError: the file holds something else.
    """

    def __init__(
        self, path: Path, settings: dict[str, Any] | None = None, plan: dict[Setting, list[Arm]] | None = None
    ):
        self.path = path
        self.settings: dict[str, Any] = {}
        self.answers: list[Answer] = []
        self.costs: list[dict[str, Any]] = []
        self.left_out: dict[str, int] = {}  # id of a question that is too long -> its tokens
        if settings is None:
            self._read(None, {})
            return
        if path.suffix != ".jsonl":
            raise ValueError(f"`output` is {path}; expected a .jsonl file.")
        settings = json.loads(json.dumps(settings))
        self.machine = settings["machine"]
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size:
            self._read(settings, plan or {})
        if not self.settings:
            self.settings = settings
            self.append([{"kind": "settings", **settings}])

    def _read(self, wanted: dict[str, Any] | None, plan: dict[Setting, list[Arm]]) -> None:
        lines = list(read_lines(self.path))
        whole = [line for line in lines if line.endswith(b"\n")]
        rows = [parse_json_object(line, self.path, number) for number, line in enumerate(whole, start=1)]
        if wanted is not None and [row.get("kind") for row in rows if row.get("kind") != "left_out"] == ["settings"]:
            # Nothing was measured with these options, perhaps because they were wrong: they may be set right.
            os.truncate(self.path, 0)
            return
        self._read_settings(rows[0] if rows else {}, wanted)
        for number, row in enumerate(rows[1:], start=2):
            if row.get("kind") == "cost":
                self.costs.append(row)
                continue
            if row.get("kind") == "left_out":
                self.left_out[row["question_id"]] = row["prompt_tokens"]
                continue
            try:
                answer = Answer.from_json(row)
            except (KeyError, TypeError) as error:
                raise ValueError(f"{self.path}, line {number} is no record of a measurement ({error}).") from error
            self.answers.append(answer)
        self._check_arms(plan, is_cut=bool(rows) and rows[-1].get("kind") == "answer")
        # Only the unit that was being written when the measurement stopped can be incomplete: it is made anew.
        last = [answer for answer in self.answers if answer.unit == self.answers[-1].unit]
        keep = len(whole)
        if rows and rows[-1].get("kind") == "answer" and len(last) < len(plan.get(last[0].setting, last)):
            keep -= len(last)
            del self.answers[-len(last) :]
        if keep < len(lines) and wanted is not None:
            os.truncate(self.path, sum(len(line) for line in lines[:keep]))
            logger.warning("Removed %d incomplete lines from the end of %s.", len(lines) - keep, self.path)

    def _check_arms(self, plan: dict[Setting, list[Arm]], is_cut: bool) -> None:
        """Arms also depend on a draft's own knobs; only the last unit may lack some, if the file `is_cut` in it."""
        arms_of: dict[tuple[Setting, int, str], set[Arm]] = {}
        for answer in self.answers:
            arms_of.setdefault(answer.unit, set()).add(answer.arm)
        for number, ((setting, *_), found) in enumerate(arms_of.items(), start=1):
            wanted = set(plan.get(setting, found))
            if found != wanted and not (is_cut and number == len(arms_of) and found < wanted):
                raise ValueError(
                    f"{self.path} was measured with the arms {', '.join(sorted(arm.label for arm in found))}, this "
                    f"measurement has {', '.join(sorted(arm.label for arm in wanted))}: a draft's own "
                    "generation_config.json has changed; choose another `output`."
                )

    def _read_settings(self, found: dict[str, Any], wanted: dict[str, Any] | None) -> None:
        if found.get("kind") != "settings":
            advice = "" if wanted is None else "; choose another `output`"
            raise ValueError(f"{self.path} is no file of a measurement{advice}.")
        self.settings = {name: value for name, value in found.items() if name != "kind"}
        for name in {} if wanted is None else wanted | self.settings:
            if name not in ("machine", "command"):
                self._check_same(name, self.settings.get(name), wanted.get(name))

    def check_same_machine(self) -> None:
        """Before more is measured; a report may be written anywhere."""
        self._check_same("machine", self.settings["machine"], self.machine)

    def _check_same(self, name: str, found: Any, wanted: Any) -> None:
        if found != wanted:
            raise ValueError(
                f"{self.path} was measured with {name} = {json.dumps(found)}, this measurement has "
                f"{json.dumps(wanted)}; choose another `output`."
            )

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write lines at once."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def add(self, answers: list[Answer]) -> None:
        """The answers of one unit."""
        self.append(answer.to_json() for answer in answers)
        self.answers.extend(answers)

    def add_cost(self, cost: dict[str, Any]) -> None:
        self.append([{"kind": "cost", **cost}])
        self.costs.append({"kind": "cost", **cost})

    def leave_out(self, question_id: str, prompt_tokens: int) -> None:
        """A question that does not fit into the target's context."""
        if question_id not in self.left_out:
            self.append([{"kind": "left_out", "question_id": question_id, "prompt_tokens": prompt_tokens}])
            self.left_out[question_id] = prompt_tokens

    @property
    def units(self) -> set[tuple[Setting, int, str]]:
        return {answer.unit for answer in self.answers}

    @property
    def name(self) -> str:
        """Of the JSONL file, compressed or not."""
        return self.path.name.removesuffix(".gz")

    def sha256(self) -> str:
        """Of the JSONL file, compressed or not."""
        return hashlib.sha256(b"".join(read_lines(self.path))).hexdigest()
