"""JSON lines: reading them, compressed or not, and a file of them that an interrupted run goes on with."""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers.utils import logging


logger = logging.get_logger(__name__)


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of a `.jsonl` or `.jsonl.gz` file, one JSON object a line; blank lines are skipped."""
    for number, line in enumerate(read_lines(Path(path)), start=1):
        if line.strip():
            yield parse_json_object(line, Path(path), number)


def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, decompressed if its name ends in `.gz`; ValueError where that is damaged or cut short."""
    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
        try:
            yield from file
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} cannot be decompressed ({error}): fetch or write the file again.") from error


def parse_json_object(line: bytes, path: Path, number: int) -> dict[str, Any]:
    """The object of one line of a JSONL file; `path` and `number` (from 1) go into the ValueError of a bad line."""
    try:
        row = json.loads(line)  # of bytes, with or without a byte-order mark
    except ValueError as error:  # covers bad JSON and bad UTF-8
        raise ValueError(f"{path}, line {number} is not JSON ({error}): expected one JSON object per line.") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path}, line {number} holds a {type(row).__name__}: expected one JSON object per line.")
    return row


class JsonLines:
    """
    A JSONL file that one process appends to, line by line, and that a later one goes on with; made, with its folders,
    when the first line is appended.

    A line counts once its line break is written: what a stopped writer left behind the last one is ignored when the
    file is read, and cut off before the first line is appended. So a file is left alone until its reader has found it
    to be its own.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._is_whole = False

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Number (from 1) and object of every whole line; none if there is no file."""
        if self.path.exists():
            for number, line in enumerate(read_lines(self.path), start=1):
                if line.endswith(b"\n"):
                    yield number, parse_json_object(line, self.path, number)

    def _make_whole(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b") as file:
            file.seek(0)
            size = sum(len(line) for line in file if line.endswith(b"\n"))
            if cut := file.tell() - size:
                file.truncate(size)
                logger.warning("Removed %d bytes of an incomplete line from the end of %s.", cut, self.path)
        self._is_whole = True

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write rows at once: either all of them reach the file or, if the process dies, its reader drops the last."""
        if not self._is_whole:
            self._make_whole()
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
