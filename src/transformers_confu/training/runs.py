"""What a training command is asked to do: runs, from a YAML file and options, and how far each of them has come."""

import difflib
import json
from argparse import ArgumentParser
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


# Trainer writes it last.
_LAST_FILE_OF_CHECKPOINT = "trainer_state.json"
# Names with a leading underscore are not uploaded by Trainer.
_RECORD = "_run.json"


def read_runs(argv: list[str], types: Mapping[str, Any]) -> list[list[str]]:
    r"""
    The options of every run of a command line: one run, or one for each stage of a YAML file.

    The command line is options alone, or a YAML file and options that override it. The file maps option names to
    values. With an entry `stages`, a list of such mappings, it describes one run for each, which the other entries are
    common to. Unless it says otherwise, a stage writes to the folder of its name in `output_dir`, and starts from the
    draft of the stage before it; the first one from the common `draft`. On the command line too `output_dir` is the
    common one, and `draft` that of the first stage, whatever the file says.

    Values reach the parser of the command line as text, so that a number means the same in both places (to YAML,
    `1e-4` is a string).

    Args:
        argv: Command line without the program's name.
        types: Of all options, by name.

    Returns:
        For each run a command line of options alone.
    """
    if not argv or not argv[0].endswith((".yaml", ".yml")):
        return [argv]
    path, overrides = argv[0], argv[1:]
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is no YAML file: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no options; write one `name: value` a line.")
    stages = settings.pop("stages", None)
    if stages is None:
        _check_names(settings, types, path)
        return [_as_options(settings, types) + overrides]
    if not isinstance(stages, list) or not all(isinstance(stage, dict) and "stage" in stage for stage in stages):
        raise ValueError(f"`stages` of {path} must be a list of mappings, each with at least a `stage`.")

    # Behind the options of every stage these would hold for all of them.
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("output_dir", "resume_from_checkpoint"):
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", default=settings.get(name))
    parser.add_argument("--draft")
    common, overrides = parser.parse_known_args(overrides)
    if common.resume_from_checkpoint is not None:
        raise ValueError(
            f"`resume_from_checkpoint={common.resume_from_checkpoint}` would hold for every stage of {path}; leave it "
            "out, as each continues from its own last checkpoint by itself, or write it into one stage of the file."
        )
    if common.output_dir is None:
        raise ValueError(f"{path} has stages and no `output_dir`; name the folder that theirs shall lie in.")
    runs: list[list[str]] = []
    folders: list[str] = []
    draft = settings.get("draft")
    for number, stage in enumerate(stages):
        default = {"output_dir": str(Path(common.output_dir) / str(stage["stage"])), "draft": draft}
        run = settings | default | stage
        if number == 0 and common.draft is not None:
            run["draft"] = common.draft
        _check_names(run, types, path)
        if run["output_dir"] in folders:
            raise ValueError(f"Two stages of {path} write to {run['output_dir']}; give one another `output_dir`.")
        folders.append(run["output_dir"])
        draft = run["output_dir"]
        runs.append(_as_options(run, types) + overrides)
    return runs


def _check_names(settings: dict[str, Any], names: Iterable[str], path: str) -> None:
    for name in settings:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1)
            hint = f"; did you mean `{near[0]}`?" if near else "."
            raise ValueError(f"{path}: no option is called `{name}`{hint}")


def _as_options(settings: dict[str, Any], types: Mapping[str, Any]) -> list[str]:
    options = []
    for name, value in settings.items():
        if value is False and types[name] not in (bool, bool | None):
            value = "no"  # as it was written, which YAML takes for a truth value
        if value is None or value == []:  # an empty list has no spelling as an option; both mean the default
            continue
        kinds = [types[name]] if get_origin(types[name]) is list else [types[name], *get_args(types[name])]
        if isinstance(value, list) and str in kinds:  # one text or several: the parser takes one
            options.append(f"--{name}={','.join(map(str, value))}")
        elif isinstance(value, list):
            options += [f"--{name}", *map(str, value)]
        else:
            options.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return options


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
