"""What a round costs on this machine: measured once for a target and a draft, kept in a file, never trusted blindly.

The clock is read here and nowhere else: automatic rounds decide by this table alone, so that a call has the same
rounds, and in half precision the same text, whenever it is repeated.
"""

import hashlib
import json
import math
import os
import tempfile
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.utils import logging


logger = logging.get_logger(__name__)

TARGET_ROWS = (1, 2, 4, 8, 16, 32, 64)
DRAFT_ROWS = (1, 4, 8)
SECONDS = 3.0
"""Most time that a measurement takes, but for its first forwards."""
MAX_REPEATS = 7
LEAST_ON_CORE = 0.8
"""Share of the time that a quiet machine gives to the thread that measures."""


@dataclass(frozen=True)
class RoundCosts:
    r"""
    Costs in steps; a step is a forward of the target over one row, with what a round does around it.

    Args:
        target_rows, target_steps (`tuple`): A forward over so many rows costs so many steps; the first is (1, 1.0).
        draft_rows, draft_steps (`tuple`): The same of a level of the draft, its head and the choice of children
            included.
        step_seconds (`float`): One step, for people; no decision depends on it.
    """

    target_rows: tuple[int, ...]
    target_steps: tuple[float, ...]
    draft_rows: tuple[int, ...]
    draft_steps: tuple[float, ...]
    step_seconds: float

    def __post_init__(self):
        for rows, steps in ((self.target_rows, self.target_steps), (self.draft_rows, self.draft_steps)):
            is_valid = (
                len(rows) == len(steps) > 0
                and rows[0] == 1
                and all(a < b for a, b in zip(rows, rows[1:], strict=False))
                and all(math.isfinite(step) and step > 0 for step in steps)
                and all(a <= b for a, b in zip(steps, steps[1:], strict=False))
            )
            if not is_valid:
                raise ValueError(f"{rows} rows cannot cost {steps} steps.")

    def target(self, rows: int) -> float:
        """Steps of a forward of the target over so many rows."""
        return _interpolated(self.target_rows, self.target_steps, rows)

    def draft(self, rows: int) -> float:
        """Steps of a draft level of so many rows."""
        return _interpolated(self.draft_rows, self.draft_steps, rows)

    @property
    def row(self) -> float:
        """Steps of one more row in the target's forward, on average up to 16 rows."""
        return (self.target(16) - 1.0) / 15

    def __str__(self) -> str:
        target = ", ".join(f"{n}: {c:.2f}" for n, c in zip(self.target_rows, self.target_steps, strict=True))
        draft = ", ".join(f"{n}: {c:.2f}" for n, c in zip(self.draft_rows, self.draft_steps, strict=True))
        return (
            f"one step takes {1000 * self.step_seconds:.1f} ms; steps of the target by rows {target}; "
            f"of a draft level by rows {draft}"
        )


def _interpolated(rows: tuple[int, ...], steps: tuple[float, ...], count: int) -> float:
    """Linear between two measured numbers of rows, and beyond the last one as between the last two."""
    right = min(max(bisect_left(rows, count), 1), len(rows) - 1)
    if right == 0:
        return steps[0]
    left = right - 1
    slope = (steps[right] - steps[left]) / (rows[right] - rows[left])
    return max(steps[left] + slope * (count - rows[left]), steps[0])


def least_seconds(parts: dict[str, Callable[[], Any]], device: torch.device) -> tuple[dict[str, float], bool]:
    """
    Seconds of each part, the least of several rounds of all parts: other work on the machine only adds to them.

    On a CPU this thread's own time counts, which stands still while another process has the core.

    Returns:
        The seconds, and whether the machine was quiet: else they are good enough for now, but not to be kept.
    """
    for part in parts.values():
        part()  # the first of a shape may compile, allocate or fetch
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    begun, begun_thread = time.perf_counter(), time.thread_time()
    for repeat in range(MAX_REPEATS):
        for name, part in parts.items():
            if repeat and time.perf_counter() - begun > SECONDS:
                break
            _wait_for(device)
            started = clock()
            part()
            _wait_for(device)
            seconds[name].append(clock() - started)
    on_core = (time.thread_time() - begun_thread) / (time.perf_counter() - begun)
    return {name: min(times) for name, times in seconds.items()}, device.type != "cpu" or on_core > LEAST_ON_CORE


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def in_steps(seconds: Iterable[float], most_steps: Iterable[float], step: float) -> tuple[float, ...]:
    """
    Seconds in steps. What falls with the number of rows, or exceeds what it can be at most, is noise.
    """
    steps: list[float] = []
    for value, most in zip(seconds, most_steps, strict=True):
        steps.append(max(min(value / step, float(most)), *steps[-1:]) if steps else min(value / step, float(most)))
    return tuple(steps)


# --- the file


CACHE_VARIABLE = "TRANSFORMERS_CONFU_CACHE"


def cache_folder() -> Path:
    """Where this package keeps what it can make again: `TRANSFORMERS_CONFU_CACHE`, else in the user's cache."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "transformers-confu"


def costs_key(target: PreTrainedModel, draft: PreTrainedModel) -> dict[str, Any]:
    """Everything that the costs depend on, as JSON values."""
    device = target.device
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        # Two processors of one name may differ in their instructions.
        hardware = " ".join(sorted(f"{name}={value}" for name, value in capabilities.items()))
    return {
        "target": _fingerprint(target),
        "draft": _fingerprint(draft),
        "device": [device.type, hardware, str(getattr(target, "hf_device_map", None))],
        "threads": torch.get_num_threads(),
        "versions": [torch.__version__, transformers.__version__],
    }


def _fingerprint(model: PreTrainedModel) -> list[Any]:
    config = hashlib.sha256(model.config.to_json_string(use_diff=False).encode()).hexdigest()[:16]
    weights = [tensor for tensor in chain(model.parameters(), model.buffers()) if tensor.ndim == 2]
    layout = sorted({f"{weight.dtype}{'' if weight.is_contiguous() else ', column-major'}" for weight in weights})
    return [type(model).__name__, config, layout, model.config._attn_implementation]


def costs_path(key: dict[str, Any]) -> Path:
    """The file of the costs of this key."""
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    return cache_folder() / "round_costs" / f"{name}.json"


def read_costs(key: dict[str, Any]) -> RoundCosts | None:
    """Kept costs; `None` where there are none, or the file is damaged or of something else."""
    try:
        content = json.loads(costs_path(key).read_text(encoding="utf-8"))
        if content["key"] != json.loads(json.dumps(key)):
            return None
        costs = content["costs"]
        return RoundCosts(
            target_rows=tuple(costs["target_rows"]),
            target_steps=tuple(costs["target_steps"]),
            draft_rows=tuple(costs["draft_rows"]),
            draft_steps=tuple(costs["draft_steps"]),
            step_seconds=float(costs["step_seconds"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_costs(key: dict[str, Any], costs: RoundCosts, names: tuple[str, str] = ("", "")) -> None:
    """Keep costs, whole or not at all; where the folder cannot be written they are measured again next time."""
    path = costs_path(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as file:
            json.dump({"names": names, "key": key, "costs": asdict(costs)}, file, indent=2)
        os.replace(file.name, path)
    except OSError as error:
        logger.warning_once(
            f"What rounds cost on this machine cannot be kept in {path.parent} ({error}), so it is measured again in "
            "each process."
        )


def kept_costs(target: str, draft: str) -> Iterator[tuple[Path, dict[str, Any], RoundCosts]]:
    """
    Kept costs of a target and a draft that were loaded by these names: the file, which may be deleted to have them
    measured anew, what else they depend on, and they.
    """
    for path in sorted((cache_folder() / "round_costs").glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if (
                content["names"] == [_place(target), _place(draft)]
                and (costs := read_costs(content["key"])) is not None
            ):
                yield path, content["key"], costs
        except (OSError, ValueError, KeyError, TypeError):
            continue  # no table


def _place(name: str) -> str:
    """A folder wherever it is named from; the id of a repository as it is."""
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


_KNOWN: dict[str, RoundCosts] = {}


def round_costs(
    target: PreTrainedModel, draft: PreTrainedModel, measure: Callable[[], tuple[RoundCosts, bool]]
) -> RoundCosts:
    """
    The costs of a target and a draft here: known to this process, kept in the file, or measured now, by a function
    that also tells whether they are to be kept.
    """
    key = costs_key(target, draft)
    path = str(costs_path(key))
    if path not in _KNOWN:
        costs = read_costs(key)
        if costs is None:
            costs, is_kept = measure()
            if is_kept:
                write_costs(key, costs, (_place(target.name_or_path), _place(draft.name_or_path)))
        _KNOWN[path] = costs
    return _KNOWN[path]
