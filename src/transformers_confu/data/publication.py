"""A folder of answers for the Hub: shards that are added and never rewritten, and a card made from them.

    confu data publish --answers answers.jsonl --prompts prompts.jsonl --output confu-answers

Each call adds the answers that the folder does not hold yet, as `data/train-00000.parquet` and so on, and those to
held-out prompts as `data/held_out-00000.parquet`. `datasets.load_dataset(folder)` and `confu train --data folder` read
it. What the card cannot know (credit for a source, further words) stands in `card.yaml`, for a person to fill in.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from huggingface_hub import DatasetCard, DatasetCardData
from transformers import HfArgumentParser

from ..common.files import differences, write_atomically
from ..common.jsonl import JsonLines
from ..common.option_files import option
from .chat_template import TEMPLATE_FIELDS, check_messages
from .dataset import HELD_OUT_SHARE, place_of_prompt
from .encoding import prompt_hash
from .prompts import SOURCES
from .rows import load_rows


SPLITS = ("train", "held_out")
_IDS = pa.list_(pa.list_(pa.int32()))  # one list for each answer of a conversation
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        "prompt_ids": _IDS,  # null where the answers came without: the chat template gives them
        "answer_ids": _IDS,
        "answer_tokens": pa.int32(),  # of all answers together
        "temperature": pa.float64(),
        "seed": pa.int64(),
        "finished": pa.bool_(),
        "source": pa.string(),
        "license": pa.string(),
        "category": pa.string(),
        "tools": pa.string(),  # as JSON, as are the next two
        "chat_template_kwargs": pa.string(),
        "made_with": pa.string(),
        "prompt_hash": pa.string(),
    }
)
_ROWS_AT_ONCE = 1000
# Licences that the Hub knows, by their SPDX name in lower case. Any other is "other" there; the table names it.
_HUB_LICENSES = {"apache-2.0", "mit", "cc0-1.0", "cc-by-4.0", "cc-by-3.0", "bsd-3-clause"}
_CARD = Path(__file__).with_name("dataset_card_template.md")


def publish_answers(
    answers: Iterable[str | Path],
    folder: str | Path,
    *,
    prompts: Iterable[Mapping[str, Any]] = (),
) -> Counter:
    """
    Add answers to a folder of Parquet shards, and write its card anew.

    Answers that the folder holds already (of the same id, temperature and seed) are skipped, so that a file which is
    still being written can be published again and again. Shards are complete when they appear.

    Args:
        answers: `.jsonl` files of `regenerate` or `regenerate_served`. An incomplete last line is ignored.
        folder: Made if missing.
        prompts: Rows of `id`, `source`, `license` and perhaps `category`, for answers that do not hold them.

    Returns:
        The numbers of rows added to `"train"` and `"held_out"`.
    """
    folder = Path(folder)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    rows = _new_rows(folder, answers, {str(row["id"]): row for row in prompts})
    tables = {split: [SCHEMA.empty_table()] for split in SPLITS}
    while some := list(islice(rows, _ROWS_AT_ONCE)):  # in Arrow they take a tenth of the room
        for split, parts in tables.items():
            of_split = [row for row in some if _split_of(row) == split]
            parts.append(pa.Table.from_pylist(of_split, schema=SCHEMA))
    added: Counter = Counter()
    for split, parts in tables.items():
        table = pa.concat_tables(parts)
        if len(table):
            path = folder / "data" / f"{split}-{len(list(folder.glob(f'data/{split}-*.parquet'))):05d}.parquet"
            pq.write_table(table, f"{path}.unfinished", compression="zstd")
            Path(f"{path}.unfinished").replace(path)
            added[split] = len(table)
    write_card(folder)
    return added


def _split_of(row: Mapping[str, Any]) -> str:
    return "held_out" if place_of_prompt(row["prompt_hash"]) < HELD_OUT_SHARE else "train"


def _new_rows(
    folder: Path, answers: Iterable[str | Path], origins: Mapping[str, Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The rows of the files that the folder does not hold yet."""
    there = _table(folder, ["id", "temperature", "seed", "made_with"])
    seen = set(zip(*(there[name].to_pylist() for name in ("id", "temperature", "seed")), strict=True))
    target = _target(json.loads(there["made_with"][0].as_py())) if len(there) else None
    for path in answers:
        if not Path(path).is_file():
            raise ValueError(f"There is no file {path}, expected a .jsonl file of answers.")
        for number, given in JsonLines(path).rows():
            try:
                row = _published(given, origins)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            made_with = _target(given.get("made_with") or {})
            target = target or made_with
            if changed := differences(target, made_with):
                raise ValueError(
                    f"{path}, line {number} was made by another target than the rest of {folder} ({changed}): "
                    "publish the answers of each target in a folder of its own."
                )
            key = (row["id"], row["temperature"], row["seed"])
            if key not in seen:
                seen.add(key)
                yield row


def _published(row: Mapping[str, Any], origins: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """An answered row in the form of `SCHEMA`."""
    if missing := [
        name for name in ("id", "messages", "answer_ids", "temperature", "finished") if row.get(name) is None
    ]:
        raise ValueError(f"it has no {', '.join(missing)}, expected an answer as `confu data regenerate` writes it.")
    origin = {**origins.get(str(row["id"]), {}), **row}
    if not origin.get("source") or not origin.get("license"):
        raise ValueError(
            f"source and licence of the prompt {row['id']!r} are not known: name the file with the prompts, whose "
            "rows hold 'id', 'source' and 'license'."
        )
    messages = check_messages(row["messages"])
    if other := {key for message in messages for key in message} - {"role", "content"}:
        raise ValueError(f"its messages hold {', '.join(sorted(other))}, expected role and content alone.")
    first = next((message["content"] for message in messages if message["role"] == "user"), "")
    made_with = dict(row.get("made_with") or {})
    if row.get("retokenized"):
        made_with["retokenized"] = True
    return {
        "id": str(row["id"]),
        "messages": messages,
        "prompt_ids": row.get("prompt_ids"),
        "answer_ids": row["answer_ids"],
        "answer_tokens": sum(map(len, row["answer_ids"])),
        "temperature": float(row["temperature"]),
        "seed": made_with.get("seed", 0) if row["temperature"] else 0,  # greedy answers do not depend on it
        "finished": row["finished"],
        **{name: origin.get(name) for name in ("source", "license", "category")},
        **{name: None if row.get(name) is None else json.dumps(row[name]) for name in TEMPLATE_FIELDS},
        "made_with": json.dumps(made_with, sort_keys=True),
        "prompt_hash": prompt_hash(first),
    }


def _target(made_with: Mapping[str, Any]) -> dict[str, Any]:
    return {name: made_with[name] for name in ("target", "model") if name in made_with}


def _table(folder: Path, columns: list[str], split: str = "*") -> pa.Table:
    """Columns of all shards."""
    paths = sorted(folder.glob(f"data/{split}-*.parquet"))
    schema = pa.schema([SCHEMA.field(name) for name in columns])
    return pa.concat_tables([schema.empty_table(), *(pq.read_table(path, columns=columns) for path in paths)])


# The card


def write_card(folder: str | Path) -> None:
    """Write `README.md` from the shards and `card.yaml`, which is completed by the sources that it does not name."""
    folder = Path(folder)
    facts: dict[str, Any] = {
        "title": folder.resolve().name,
        "target": "",
        "language": ["en"],
        "text": "",
        "sources": {},
    }
    file = folder / "card.yaml"
    if file.exists():
        given = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not isinstance(given, dict) or not given.keys() <= facts.keys():
            raise ValueError(f"{file} holds {given!r:.80}, expected entries of {', '.join(facts)}.")
        facts |= given
    columns = ["source", "license", "temperature", "finished", "answer_tokens", "made_with"]
    frame = _table(folder, columns).to_pandas()
    for row in frame.drop_duplicates("source").itertuples():
        credit = SOURCES[row.source].credit if row.source in SOURCES else ""
        facts["sources"].setdefault(row.source, {"license": row.license, "credit": credit})
    write_atomically(file, yaml.safe_dump(facts, sort_keys=False, allow_unicode=True))

    licenses = {str(source["license"]).lower() for source in facts["sources"].values()}
    splits = {split: number for split in SPLITS if (number := len(_table(folder, ["id"], split)))}
    data_files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits]
    metadata = DatasetCardData(
        pretty_name=facts["title"],
        language=facts["language"],
        license=sorted({name if name in _HUB_LICENSES else "other" for name in licenses}),
        task_categories=["text-generation"],
        tags=["speculative-decoding", "on-policy", "confu"],
        configs=[{"config_name": "default", "data_files": data_files}],
    )
    made_with = json.loads(frame.made_with[0]) if len(frame) else {}
    names = (facts["target"], *(made_with.get(name) for name in ("target_name", "model", "target")))
    sums = {"rows": ("finished", "size"), "tokens": ("answer_tokens", "sum"), "finished": ("finished", "mean")}
    by_temperature, by_source = (frame.groupby(name).agg(**sums).itertuples() for name in ("temperature", "source"))
    sources = {name: (source["license"], source["credit"]) for name, source in facts["sources"].items()}
    text = _CARD.read_text(encoding="utf-8").format(
        title=facts["title"],
        target=next(filter(None, names), None),
        conversations=len(frame),
        tokens=frame.answer_tokens.sum(),
        text=facts["text"].strip(),
        share=HELD_OUT_SHARE,
        hash=made_with.get("target", "not known"),
        splits=_lines((split, f"{number:,}") for split, number in splits.items()),
        temperatures=_lines(
            (f"{row.Index:g}", f"{row.rows:,}", f"{row.tokens:,}", f"{row.finished:.0%}") for row in by_temperature
        ),
        sources=_lines((row.Index, *sources[row.Index], f"{row.rows:,}", f"{row.tokens:,}") for row in by_source),
    )
    text = text.replace("\n\n\n\n", "\n\n")  # where there are no further words
    write_atomically(folder / "README.md", str(DatasetCard(f"---\n{metadata.to_yaml()}\n---\n\n{text}")))


def _lines(rows: Iterable[Sequence[str]]) -> str:
    """Rows of a table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


@dataclass
class PublicationArguments:
    """Of the command line."""

    answers: list[str] = option("JSONL files of answers, as `confu data regenerate` writes them.", ...)
    output: str = option("Folder of the dataset; answers that it does not hold yet are added.", ...)
    prompts: str | None = option("Rows with 'id', 'source' and 'license', for answers that do not name their source.")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `publish_answers` from the command line."""
    (arguments,) = HfArgumentParser(PublicationArguments).parse_args_into_dataclasses(args=argv)
    prompts = load_rows(arguments.prompts) if arguments.prompts else ()
    added = publish_answers(arguments.answers, arguments.output, prompts=prompts)
    print("\n".join(f"rows added to {split}: {added[split]:,}" for split in SPLITS))
    print(f"The card is {Path(arguments.output) / 'README.md'}; credits of sources go into card.yaml beside it.")
