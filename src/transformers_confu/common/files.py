"""Files that are written whole or not at all, and whether what they were made with is what is asked for now."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_atomically(path: str | Path, text: str) -> None:
    """Write a text file so that a process that dies leaves either the old content or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def read_json(path: str | Path) -> dict[str, Any]:
    """The object of a JSON file; the ValueError of one that holds something else names it."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))  # with or without a mark
    except ValueError as error:  # covers bad JSON and bad UTF-8
        raise ValueError(f"{path} is no valid JSON ({error}); delete it or get it anew.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected an object with named entries.")
    return value


def share(folder: str | Path) -> None:
    """Give the files of a folder the permissions of ordinary ones: safetensors writes weights for their owner only."""
    mask = os.umask(0)
    os.umask(mask)
    for path in Path(folder).rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two sets of settings, for an error: "a was 1, is 2; b was ..."; empty if nothing does."""
    return "; ".join(
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    )
