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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.utils import logging


logger = logging.get_logger(__name__)

CONTEXT, LONG_CONTEXT = 128, 2048
"""Tokens behind which rounds are measured."""
TARGET_ROWS, TARGET_ROWS_LONG = (1, 2, 4, 8, 16, 32, 64), (1, 4, 16, 64)
DRAFT_ROWS, DRAFT_ROWS_LONG = (1, 4, 8), (1, 8)
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
        step_seconds (`float`): One step.
        context (`int`): Tokens of text behind which these are the costs.
        longer (`RoundCosts`, *optional*): The costs behind a longer text.
    """

    target_rows: tuple[int, ...]
    target_steps: tuple[float, ...]
    draft_rows: tuple[int, ...]
    draft_steps: tuple[float, ...]
    step_seconds: float
    context: int = CONTEXT
    longer: "RoundCosts | None" = None

    @classmethod
    def of(cls, target: dict[int, float], draft: dict[int, float], **others: Any) -> "RoundCosts":
        """Costs from seconds by rows. What falls with the rows, or exceeds what they cost one by one, is noise."""
        step = target[1]
        target_steps: list[float] = []
        draft_steps: list[float] = []
        for rows, seconds in target.items():
            target_steps.append(max(min(seconds / step, float(rows)), *target_steps[-1:], 1.0))
        for seconds in draft.values():
            draft_steps.append(max(seconds / step, *draft_steps[-1:], 0.0))
        return cls(tuple(target), tuple(target_steps), tuple(draft), tuple(draft_steps), step, **others)

    def at(self, length: int) -> "RoundCosts":
        """The costs behind a text of so many tokens: seconds grow with it in a straight line."""
        if self.longer is None or length <= self.context:
            return self
        share = (length - self.context) / (self.longer.context - self.context)

        def between(rows: int, cost: Callable[["RoundCosts", int], float]) -> float:
            short, long = (costs.step_seconds * cost(costs, rows) for costs in (self, self.longer))
            return short + share * max(long - short, 0.0)

        return RoundCosts.of(
            {rows: between(rows, RoundCosts.target) for rows in self.target_rows},
            {rows: between(rows, RoundCosts.draft) for rows in self.draft_rows},
            context=length,
        )

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
        if not 0 < self.step_seconds < math.inf or (self.longer and self.longer.context <= self.context):
            raise ValueError(f"Behind {self.context} tokens a step cannot cost {self.step_seconds} seconds.")

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
            f"behind {self.context} tokens one step takes {1000 * self.step_seconds:.1f} ms; steps of the target by "
            f"rows {target}; of a draft level by rows {draft}" + ("" if self.longer is None else f"; {self.longer}")
        )


def _interpolated(rows: tuple[int, ...], steps: tuple[float, ...], count: int) -> float:
    """Linear between two measured numbers of rows, and beyond the last one as between the last two."""
    right = min(max(bisect_left(rows, count), 1), len(rows) - 1)
    if right == 0:
        return steps[0]
    left = right - 1
    slope = (steps[right] - steps[left]) / (rows[right] - rows[left])
    return max(steps[left] + slope * (count - rows[left]), steps[0])


def least_seconds(parts: dict[Any, Callable[[], Any]], device: torch.device) -> tuple[dict[Any, float], bool]:
    """
    Seconds of each part, the least of several rounds of all parts: other work on the machine only adds to them.

    On a CPU this thread's own time counts, which stands still while another process has the core.

    Returns:
        The seconds, and whether the machine was quiet: else they are good enough for now, but not to be kept.
    """
    for part in parts.values():
        part()  # the first of a shape may compile, allocate or fetch
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    seconds: dict[Any, list[float]] = {name: [] for name in parts}
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
        # Two processors of one name may differ in their instructions, and torch be held to some of them.
        hardware = " ".join(sorted(f"{name}={value}" for name, value in capabilities.items()))
        hardware += f" used={torch.backends.cpu.get_cpu_capability()}"
    return {
        "target": _fingerprint(target),
        "draft": _fingerprint(draft),
        "device": [device.type, hardware, str(getattr(target, "hf_device_map", None))],
        "threads": torch.get_num_threads(),
        "versions": [torch.__version__, transformers.__version__],
    }


def _fingerprint(model: PreTrainedModel) -> list[Any]:
    config = hashlib.sha256(model.config.to_json_string(use_diff=False).encode()).hexdigest()[:16]
    # A quantised, packed or wrapped layer is of a class of its own.
    layers = {
        f"{type(module).__name__} {weight.dtype} {weight.stride()[-1]}"
        for module in model.modules()
        for weight in chain(module.parameters(recurse=False), module.buffers(recurse=False))
        if weight.ndim == 2
    }
    return [type(model).__name__, config, sorted(layers), model.config._attn_implementation]


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
        return _as_costs(content["costs"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _as_costs(values: dict[str, Any]) -> RoundCosts:
    """From what `asdict` made of them, and JSON of that."""
    longer = values.pop("longer")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return RoundCosts(**values, longer=longer and _as_costs(longer))


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
