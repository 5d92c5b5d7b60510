"""The output folder of a training run, and how far the run has come."""

import json
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


# Trainer writes it last.
_LAST_FILE_OF_CHECKPOINT = "trainer_state.json"
# Names with a leading underscore are not uploaded by Trainer.
_RECORD = "_run.json"


def _off(value: Any) -> Any:
    """`None` for an option that is off: one that an older record does not know was off when the run was made."""
    return None if value is False else value


def _changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs, for an error; empty if nothing does."""
    return "; ".join(
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in sorted({*before, *now})
        if _off(before.get(name)) != _off(now.get(name))
    )


class RunFolder:
    r"""
    The output folder of a run, and how far the run has come.

    Args:
        path: The folder.
        recipe: What the outcome of the run depends on, by name; JSON values.

    Raises:
        ValueError: the folder holds a run with another recipe.
    """

    def __init__(self, path: str | Path, recipe: dict[str, Any]):
        self.path = Path(path)
        self.recipe = json.loads(json.dumps(recipe))
        self.conditions: dict[str, Any] = {}
        record = json.loads(text) if (text := self._read()) else {"recipe": self.recipe, "finished": False}
        self.finished: bool = record["finished"]
        if changed := _changes(record["recipe"], self.recipe):
            state = "a finished" if self.finished else "an interrupted"
            raise ValueError(
                f"{self.path} holds {state} run with other options ({changed}): use another `output_dir`, or delete "
                "this one to train anew."
            )

    def run_under(self, conditions: dict[str, Any], continued: bool) -> None:
        """
        Take note of what the batches of an unfinished run depend on besides its recipe, and is known only now.

        Args:
            conditions: By name; JSON values.
            continued: Whether the run goes on from a checkpoint.

        Raises:
            ValueError: it does, and was begun under other conditions.
        """
        begun_under = json.loads(text).get("conditions") if continued and (text := self._read()) else None
        # A record of an older version has none.
        if begun_under is not None and (changed := _changes(begun_under, conditions)):
            raise ValueError(
                f"{self.path} holds an interrupted run, which would go on with other batches ({changed}): continue it "
                "as it was begun, use another `output_dir`, or delete this one to train anew."
            )
        self.conditions = conditions

    def _read(self) -> str | None:
        record = self.path / _RECORD
        return record.read_text() if record.exists() else None

    def write(self, finished: bool) -> None:
        """Record that the run is under way, or finished."""
        self.path.mkdir(parents=True, exist_ok=True)
        record = {"finished": finished, "recipe": self.recipe, "conditions": self.conditions}
        (self.path / _RECORD).write_text(json.dumps(record, indent=2))

    def last_checkpoint(self) -> str | None:
        """Folder of the newest checkpoint of a recorded run that was written to its end, if there is one."""
        if self._read() is None:
            return None
        steps = {
            int(folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")): folder
            for folder in self.path.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
            if folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-").isdecimal()
            and (folder / _LAST_FILE_OF_CHECKPOINT).exists()
        }
        return str(steps[max(steps)]) if steps else None
