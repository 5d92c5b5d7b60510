"""
The file of a measurement, JSON lines. Its first line has `kind` "settings": what is measured, under `machine` on what,
and under `command` by what. Every further line is of one of two kinds:

- "unit": one question under one `setting` in one `run`, answered by all arms. They are written together, so that an
  interrupted measurement never compares answers that were made hours apart. In `answers` each arm has its `order`
  (its place among the arms, which take turns), its `turns`, `skipped_turns` (too long for the target's context, with
  their answer; if the first one is, there are no turns) and `departure`: where its text leaves plain generation's, or
  null. That names turn, position of the first other token, and `gap`, how far apart the target's logits of the two
  tokens lie in one forward over the common text (null if one text ends there, or when sampling). A turn has
  `prompt_tokens` (earlier turns included), `token_ids` up to and including EOS, `seconds` of the whole call,
  `peak_memory_bytes` (of a GPU, else null), and `rounds` (null for plain generation): tokens `emitted` by each round,
  and for drafts how many of them were drafted (`accepted`), rows, seconds by part and bytes of caches, as in
  `ConFuStatistics`.
- "cost": what the target's forward costs by rows, or what the mixtures add to a round of an arm (see `costs.py`).
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..common.files import differences
from ..common.jsonl import JsonLines, read_lines
from .arms import Setting


class RecordFile:
    """
    The records on disk, in a `.jsonl` file, which need not be there yet, or a `.jsonl.gz` one: to be read, and after
    [`go_on`] to be added to. ValueError if the file holds something else.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.lines = JsonLines(self.path)
        self.settings: dict[str, Any] = {}
        self.units: dict[tuple[Setting, int, str], dict[str, Any]] = {}  # (setting, run, question id) -> line
        self.costs: list[dict[str, Any]] = []
        for number, row in self.lines.rows():
            if (row.get("kind") == "settings") != (number == 1) or not self._take(row):
                raise ValueError(f"{self.path}, line {number} is no record of a measurement; choose another file.")

    def _take(self, row: dict[str, Any]) -> bool:
        """Whether a line is a record."""
        kind = row.get("kind")
        if kind == "settings":
            self.settings = {name: value for name, value in row.items() if name != "kind"}
        elif kind == "unit":
            self.units[Setting(**row["setting"]), row["run"], row["question_id"]] = row
        elif kind == "cost":
            self.costs.append(row)
        return kind in ("settings", "unit", "cost")

    def go_on(self, settings: dict[str, Any]) -> None:
        """
        Take up the measurement that the file holds, or begin one; ValueError if it holds another. Machine and command
        may be others than those of the file, from which a report can be written anywhere; see [`check_same_machine`].
        """
        if self.path.suffix != ".jsonl":
            raise ValueError(f"`output` is {self.path}; expected a .jsonl file.")
        settings = json.loads(json.dumps(settings))  # as it will be read again
        if not self.units and not self.costs:  # nothing is lost, should these be other settings
            self.path.unlink(missing_ok=True)
            self.add({"kind": "settings", **settings})
            return
        apart = dict.fromkeys(("machine", "command"))
        if changed := differences(self.settings | apart, settings | apart):
            raise ValueError(f"{self.path} holds another measurement ({changed}); choose another `output`.")

    def check_same_machine(self, machine: dict[str, Any]) -> None:
        """Before more is measured: speeds of two machines do not belong together."""
        if changed := differences(self.settings["machine"], machine):
            raise ValueError(f"{self.path} was measured on another machine ({changed}); choose another `output`.")

    def add(self, row: dict[str, Any]) -> None:
        """Write a line at once."""
        self.lines.append([row])
        self._take(row)

    @property
    def name(self) -> str:
        """Of the measurement: that of the file without its suffixes."""
        return self.path.name.removesuffix(".gz").removesuffix(".jsonl")

    @property
    def asked(self) -> dict[str, Any]:
        """How many questions, and the SHA-256 of their content."""
        return self.settings["questions"]

    @property
    def answers(self) -> Iterable[tuple[dict[str, Any], dict[str, Any]]]:
        """Every unit with each of its answers."""
        return ((unit, answer) for unit in self.units.values() for answer in unit["answers"])

    def sha256(self) -> str:
        """Of the JSONL file, compressed or not."""
        return hashlib.sha256(b"".join(read_lines(self.path))).hexdigest()
