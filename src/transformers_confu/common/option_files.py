"""Options of a command from a YAML file, which options of the command line override; options that hold JSON."""

import difflib
import json
from argparse import ArgumentParser
from collections.abc import Iterable, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml


def option(help: str, default: Any = None, **settings: Any) -> Any:
    """
    A field of a dataclass of options, as `HfArgumentParser` reads them. The default is a value, a function that makes
    it, or `...` for an option that must be given; `settings` are more for `add_argument`.
    """
    metadata = {"help": help, **settings}
    if default is ...:
        return field(metadata=metadata)
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def read_option_file(argv: list[str], types: Mapping[str, Any]) -> list[list[str]]:
    r"""
    The options of every run of a command line: one run, or one for each stage of a YAML file.

    The command line is options alone, or a YAML file and options that override it. The file maps option names to
    values. With an entry `stages`, a list of such mappings, it describes one run for each, which the other entries are
    common to. Unless it says otherwise, a stage writes to the folder of its name in `output_dir`, and starts from the
    draft of the stage before it; the first one from the common `draft`. On the command line too `output_dir` is the
    common one, and `draft` that of the first stage, whatever the file says.

    Values reach the parser of the command line as text, so that a number means the same in both places (to YAML,
    `1e-4` is a string): for each run a command line of options alone is returned. `types` are of all options, by name.
    """
    if not argv or not argv[0].endswith((".yaml", ".yml")):
        return [argv]
    path, overrides = argv[0], argv[1:]
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
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


def json_option(name: str, text: str) -> dict[str, Any]:
    """The object that an option of a command holds as JSON; `name` goes into the ValueError of anything else."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} is {text!r}, expected a JSON object ({error}).") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {text!r}, expected a JSON object.")
    return value
