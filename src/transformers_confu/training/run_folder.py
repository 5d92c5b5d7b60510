"""The output folder of a training run, and how far the run has come."""

import json
from pathlib import Path
from typing import Any

from transformers.trainer_utils import sort_checkpoints
from transformers.utils import logging

from ..common.files import differences, read_json, write_atomically


logger = logging.get_logger(__name__)


class RunFolder:
    """
    The output folder of a run, and how far the run has come; ValueError where it holds a run with other options, which
    are what the outcome depends on, by name, as JSON values.
    """

    def __init__(self, path: str | Path, options: dict[str, Any]):
        self.path = Path(path)
        self._file = self.path / "_run.json"
        self._record: dict[str, Any] = {"options": json.loads(json.dumps(options)), "conditions": {}}
        self._found = read_json(self._file) if self._file.exists() else {}
        self.finished: bool = self._found.get("finished", False)
        self._compare(
            "options", f"{'a finished' if self.finished else 'an interrupted'} run with other options", "use"
        )

    def _compare(self, part: str, what: str, cure: str) -> None:
        if self._found and (changed := differences(self._found.get(part, {}), self._record[part])):
            raise ValueError(
                f"{self.path} holds {what} ({changed}): {cure} another `output_dir`, or delete this one to train anew."
            )

    def run_under(self, conditions: dict[str, Any], continued: bool) -> None:
        """
        Take note of what the batches of an unfinished run depend on besides its options, and is known only now;
        ValueError where it goes on from a checkpoint and was begun under other conditions.
        """
        self._record["conditions"] = conditions
        if continued:
            what = "an interrupted run, which would go on with other batches"
            self._compare("conditions", what, "continue it as it was begun, use")

    def write(self, finished: bool) -> None:
        """Record that the run is under way, or finished."""
        write_atomically(self._file, json.dumps(self._record | {"finished": finished}, indent=2))

    def last_checkpoint(self) -> str | None:
        """Folder of the newest whole checkpoint of a recorded run, if there is one."""
        for folder in reversed(sort_checkpoints(str(self.path))) if self._found else ():
            if Path(folder, "trainer_state.json").exists():  # Trainer writes it last
                return folder
            logger.warning("%s was not written to its end, and is left out.", folder)
        return None
