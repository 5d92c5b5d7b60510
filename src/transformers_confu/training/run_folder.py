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
        # Names with a leading underscore are not uploaded by Trainer.
        self._record = self.path / "_run.json"
        self._options = json.loads(json.dumps(options))
        found = read_json(self._record) if self._record.exists() else {}
        self.finished: bool = found.get("finished", False)
        self._conditions: dict[str, Any] = found.get("conditions", {})
        if found and (changed := differences(found.get("options", {}), self._options)):
            state = "a finished" if self.finished else "an interrupted"
            raise ValueError(
                f"{self.path} holds {state} run with other options ({changed}): use another `output_dir`, or delete "
                "this one to train anew."
            )

    def run_under(self, conditions: dict[str, Any], continued: bool) -> None:
        """
        Take note of what the batches of an unfinished run depend on besides its options, and is known only now;
        ValueError where it goes on from a checkpoint and was begun under other conditions.
        """
        if continued and self._record.exists() and (changed := differences(self._conditions, conditions)):
            raise ValueError(
                f"{self.path} holds an interrupted run, which would go on with other batches ({changed}): continue it "
                "as it was begun, use another `output_dir`, or delete this one to train anew."
            )
        self._conditions = conditions

    def write(self, finished: bool) -> None:
        """Record that the run is under way, or finished."""
        record = {"finished": finished, "options": self._options, "conditions": self._conditions}
        write_atomically(self._record, json.dumps(record, indent=2))

    def last_checkpoint(self) -> str | None:
        """Folder of the newest whole checkpoint of a recorded run, if there is one."""
        if not self._record.exists():
            return None
        for folder in reversed(sort_checkpoints(str(self.path))):
            if Path(folder, "trainer_state.json").exists():  # Trainer writes it last
                return folder
            logger.warning("%s was not written to its end, and is left out.", folder)
        return None
