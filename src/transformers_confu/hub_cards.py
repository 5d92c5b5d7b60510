"""
The code inside the checkpoints of `hub_cards/`, which work without this package installed: `python -m
transformers_confu.hub_cards` copies it from the source tree, `--check` only compares.

A folder of `hub_cards/` is what its Hub repository holds: model card, config, weights, and the six inference files.
The last are generated and never edited there.
"""

import argparse
import json
import sys
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files


SOURCE = Path(__file__).parent
HUB_CARDS = SOURCE.parents[1] / "hub_cards"

AUTO_MAP = {
    "AutoConfig": "configuration_confu.ConFuConfig",
    "AutoModel": "modeling_confu.ConFuDraftModel",
}


def inference_files() -> dict[str, bytes]:
    """Name and content of each code file that a checkpoint needs, as Transformers finds them when it saves a draft."""
    model = SOURCE / "modeling_confu.py"
    files = [model, *map(Path, get_relative_import_files(model))]
    return {file.name: file.read_bytes() for file in sorted(files)}


def differing_files(folder: Path) -> list[str]:
    """Names of the code files of a checkpoint that are missing, other than in the source tree, or not needed."""
    wanted = inference_files()
    found = {file.name: file.read_bytes() for file in folder.glob("*.py")}
    return sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))


def update(folder: Path) -> list[str]:
    """Make the code files of a checkpoint those of the source tree; names of the files that changed."""
    changed = differing_files(folder)
    wanted = inference_files()
    for name in changed:
        if name in wanted:
            (folder / name).write_bytes(wanted[name])
        else:
            (folder / name).unlink()
    return changed


def check_auto_map(folder: Path) -> None:
    r"""
    Raises:
        ValueError: `config.json` is missing or does not lead `AutoConfig` and `AutoModel` to ConFu's classes.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: save a draft into this folder with `save_pretrained`.")
    auto_map = json.loads(path.read_text(encoding="utf-8")).get("auto_map")
    if auto_map != AUTO_MAP:
        raise ValueError(f"{path} has the `auto_map` {auto_map}, expected {AUTO_MAP}: save the draft again.")


def main(argv: list[str] | None = None, root: Path = HUB_CARDS) -> int:
    """The command; its exit status. `root` holds one folder per checkpoint."""
    parser = argparse.ArgumentParser(
        prog="python -m transformers_confu.hub_cards", description="Copy the inference code into hub_cards/."
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file differs")
    check = parser.parse_args(argv).check

    folders = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    if not folders:
        print(f"No checkpoint folder in {root}: run this in a clone of the repository.", file=sys.stderr)
        return 1
    failed = False
    for folder in folders:
        try:
            check_auto_map(folder)
        except ValueError as error:
            print(error, file=sys.stderr)
            failed = True
            continue
        changed = differing_files(folder) if check else update(folder)
        failed |= check and bool(changed)
        for name in changed:
            print(f"{folder.name}/{name}: {'differs from src/transformers_confu' if check else 'written'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
