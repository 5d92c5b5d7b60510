"""Rows from wherever they are: files, folders, addresses, datasets of the Hub; memory-mapped by `datasets`."""

from pathlib import Path

from aiohttp import ClientError
from datasets import Dataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from ..common.jsonl import read_jsonl


_BUILDERS = {"jsonl": "json", "json": "json", "csv": "csv", "parquet": "parquet"}


def load_rows(source: str | Path) -> Dataset:
    """
    Read rows. `datasets` keeps a copy in its cache and maps it into memory, so that a large file takes little of it.

    Args:
        source: One of

            - a `.jsonl`, `.json`, `.csv` or `.parquet` file, also compressed (`.gz`), or its https address,
            - a folder that `Dataset.save_to_disk` wrote, or one of data files,
            - the id of a Hub dataset, with a split if it is not "train" and a configuration if it has several:
              `"HuggingFaceH4/ultrachat_200k:train_sft"`, `"openai/gsm8k:main:train"`.

            Of a folder with the splits `train` and `held_out` (as `confu data publish` writes it) both are read:
            whoever trains holds the same prompts out again.
    """
    source = str(source)
    path = Path(source)
    try:
        if path.is_dir():
            if (path / "dataset_info.json").exists():
                return load_from_disk(source)
            # Published answers. By their files and not by the folder: of a local folder with a card, `datasets` would
            # find an earlier state in its cache after shards were added.
            found = {split: sorted(map(str, path.glob(f"data/{split}-*.parquet"))) for split in ("train", "held_out")}
            if shards := {split: paths for split, paths in found.items() if paths}:
                return load_dataset("parquet", data_files=shards, split="+".join(shards))
            return load_dataset(source, split="train")
        kind = _BUILDERS.get(path.name.removesuffix(".gz").rpartition(".")[2])
        is_address = source.startswith(("https://", "http://"))
        if kind is not None and (path.is_file() or is_address):
            return load_dataset(kind, data_files=source, split="train")
        if path.is_file() or is_address or (kind is not None and ":" not in source):
            if not path.exists():
                raise FileNotFoundError(source)
            raise ValueError(f"expected one of the kinds {', '.join(_BUILDERS)}")
        name, *rest = source.split(":")
        *configuration, split = rest or ["train"]
        return load_dataset(name, *configuration, split=split)
    except FileNotFoundError as error:
        raise ValueError(
            f"There is no file, folder, address or Hub dataset {source}, or it is out of reach: {error}"
        ) from error
    except (DatasetGenerationError, OSError, ValueError, RuntimeError, TypeError, ClientError, EOFError) as error:
        if path.is_file() and ".jsonl" in path.name:
            for _ in read_jsonl(path):  # names the line that is wrong
                pass
        raise ValueError(
            f"{source} cannot be read as a file, folder, address or Hub dataset (id, id:split or "
            f"id:configuration:split): {_reason(error)}"
        ) from error
    except StopIteration as error:
        raise ValueError(f"{source} holds no row.") from error


def _reason(error: BaseException) -> str:
    """The innermost cause, since `datasets` says only that something failed; by hand for files that do not match."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    if "column names don't match" in text:
        return f"its files have different columns, so give each of them by its own name ({text})"
    return text
