"""
The report on one measurement or several: a conclusion in words, tables and plots, as a Markdown page and as one HTML
page that needs no other file. `confu report` and `confu evaluate --report` both write it.
"""

import argparse
import base64
import html
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..publishing.model_card import add_evaluation
from . import tables
from .arms import PROMPT_LOOKUP_TOKENS, TREE_KNOBS
from .card import card_evaluation
from .figures import Comparison, comparisons_of
from .plots import Plot, draw, forward_curve, round_costs, speedup_by_group, survival, sweep
from .records import RecordFile
from .tables import Table, against


HOW, STYLE = Path(__file__).with_name("how_it_was_measured.md"), Path(__file__).with_name("report.css")
MARK = "<!-- Written by `confu report` from here on; what stands above this line is kept. -->"
Part = str | Table | Plot  # text is a paragraph, or a heading behind "## ", with `code` and **bold** words


def main(argv: list[str] | None = None) -> None:
    """The command `confu report`."""
    parser = argparse.ArgumentParser(
        prog="confu report",
        description="Write the report on one or several measurements of `confu evaluate`. Name the main one first: "
        "pictures are made of the first that has what they show.",
    )
    parser.add_argument("records", nargs="+", type=Path, help="JSONL files that `confu evaluate` wrote (also .gz)")
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        help="a folder for report.html, report.md and pictures; or a .md file, for that page alone, whose text above "
        "its mark is kept, with its pictures in a folder of its name",
    )
    parser.add_argument(
        "--against",
        nargs="+",
        type=Path,
        default=[],
        metavar="EARLIER",
        help="earlier records of the same questions, of another draft or build: how much more or less is accepted now",
    )
    parser.add_argument(
        "--card", type=Path, help="folder of a draft, whose card.yaml takes over its figures; they appear in its card"
    )
    arguments = parser.parse_args(argv)
    files = [RecordFile(path) for path in arguments.records]
    print(write_report(files, arguments.output, [RecordFile(path) for path in arguments.against]))
    if arguments.card is not None:
        for comparison in comparisons_of(files):
            add_evaluation(arguments.card, card_evaluation(comparison, arguments.card))


def write_report(files: Sequence[RecordFile], output: Path, earlier: Sequence[RecordFile] = ()) -> Path:
    """
    Write the report on measurements, the main one first, to a folder or a .md file (see the command's help); the path
    of the page. ValueError for an empty measurement, `earlier` records of something else, or an `output` of another
    kind.
    """
    is_page = output.suffix == ".md"
    if not is_page and (output.suffix or output.is_file()):
        raise ValueError(f"The output is {output}; expected a folder or a .md file.")
    page, folder = (output, output.with_suffix("")) if is_page else (output / "report.md", output)
    before = "# ConFu evaluation\n"
    if page.exists():
        before, mark, _ = page.read_text(encoding="utf-8").partition(MARK)
        if not mark:
            raise ValueError(f"{page} has no line {MARK!r}; add it where the results shall go, or delete the file.")
    parts = report_parts(files, earlier)
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts:
        if isinstance(part, Plot):
            (folder / f"{part.name}.png").write_bytes(part.png)
    text = "\n\n".join(markdown(part, folder.relative_to(page.parent).as_posix()) for part in parts)
    page.write_text(f"{before.rstrip()}\n\n{MARK}\n\n{text}\n", encoding="utf-8")
    if is_page:
        return page
    (folder / "report.html").write_text(html_page(parts), encoding="utf-8")
    return folder / "report.html"


def report_parts(files: Sequence[RecordFile], earlier: Sequence[RecordFile] = ()) -> list[Part]:
    """All that stands on the page, in order."""
    everything = comparisons_of(files)
    curves = [cost for file in files for cost in file.costs if "points" in cost]

    def picture(drawing: Any, name: str | None = None) -> Plot | None:
        """Of the first comparison that has what it shows."""
        return next(filter(None, (draw(drawing, c, name=name) for c in everything)), None)

    parts: list[Part | None] = [
        *map(conclusion, everything),
        "## Speed and accepted length",
        tables.speed_table(everything),
        picture(speedup_by_group),
        *(picture(partial(sweep, knob=knob), knob) for knob in (*TREE_KNOBS, "contemplation")),
        tables.group_table(everything),
        "## What the draft predicts",
        tables.difference_table(everything),
        tables.earlier_table(everything, comparisons_of(earlier)),
        picture(survival),
        tables.acceptance_table(everything),
        "## What a round costs",
        tables.time_table(everything),
        picture(round_costs),
        tables.contemplation_table(everything),
        tables.curve_table(curves),
        draw(forward_curve, curves),
        tables.memory_table(everything),
        "## Texts against plain generation's",
        tables.exactness_table(everything),
        "## How it was measured",
        *HOW.read_text(encoding="utf-8").strip().split("\n\n"),
        *map(about, files),
    ]
    return [part for part in parts if part is not None and not (isinstance(part, Table) and not part.rows)]


def conclusion(c: Comparison) -> str:
    """Which arm was fastest, by how much, and what to set."""
    speedups = c.speedup_total()
    best = str(speedups.loc[0].idxmax())
    if best == c.plain:
        others = speedups.loc[0].drop(best)
        nearest = f" ({others.idxmax()}: {others.max():.2f} times its speed)" if len(others) else ""
        return f"**{c}**: nothing was faster than plain `generate`{nearest}. Decode without a draft."
    arm, fastest, tau = c.arms[best], c.interval(speedups[best]), c.interval(c.tau()[best])
    sentences = [f"**{c}**: fastest is **{best}**, {fastest:.2f} times plain `generate`, with a tau of {tau:.2f}."]
    if not fastest.low > 1:
        sentences.append("That is not certainly faster than plain `generate`.")
    others = [other for other in c.arms if other not in (best, c.plain)]
    if equal := [other for other in others if not c.interval(speedups[best] / speedups[other]).low > 1]:
        sentences.append(f"Not certainly slower: {'; '.join(equal)}.")
    if c.limit(best) > 0:
        sentences.append(f"Were each of its rounds one forward of the target and nothing else: {c.limit(best):.2f}.")
    if arm.kind == "other_layout":
        sentences.append("To set it: `use_packed_weights(target)`, or not, where it has been called.")
    elif arm.kind == "prompt_lookup":
        sentences.append(f"To set it: `prompt_lookup_num_tokens={PROMPT_LOOKUP_TOKENS}`.")
    elif arm.knobs:
        sentences.append("To set it: " + ", ".join(f"`{name}={value}`" for name, value in arm.knobs.items()) + ".")
        if arm.tree_size is None:
            sentences.append("Set no size: its rounds are automatic.")
    elif arm.kind == "draft":
        sentences.append("It is what you get without setting a knob.")
    contemplating = [name for name in c.drafted if c.arms[name].contemplation != 0 and c.references(name)]
    if contemplating:
        name = max(contemplating, key=lambda name: speedups[name][0])
        change, factor = against(c, name, c.references(name)[0])
        sentences.append(
            f"Future predictions ({name}) change tau by {change:.2f}, and speed by a factor {factor:.2f}."
        )
    return " ".join(sentences)


def about(file: RecordFile) -> str:
    """What was measured, on what and by which command."""
    settings, asked = file.settings, file.asked
    # A draft in a folder is known by a digest of its weights, one on the Hub by its id.
    marks = {name: re.sub("^([0-9a-f]{12})[0-9a-f]{52}$", r"\1", mark) for name, mark in settings["drafts"].items()}
    questions = f"Questions: {asked['number']} (SHA-256 of their content {asked['sha256'][:12]})"
    if cut := dict.fromkeys(unit["question_id"] for unit, answer in file.answers if answer["skipped_turns"]):
        questions += f"; turns that exceed the target's context are left out, of {', '.join(cut)} (ids)"
    command = (settings.get("command") or "not recorded").split("\n")[0]
    return (
        f"**{file.name}**: `{command}`. Target: {settings['target']}. Drafts, with the start of a digest of their "
        f"weights: {', '.join(f'{name} ({mark})' for name, mark in marks.items()) or 'none'}. {questions}. "
        f"Runs: {len({run for _, run, _ in file.units})}. "
        f"Machine: {', '.join(f'{name} {value}' for name, value in settings['machine'].items())}. Records: "
        f"{file.path.name.removesuffix('.gz')}, {len(list(file.answers)):,} answers, SHA-256 {file.sha256()}."
    )


# --- the two forms of a page


def markdown(part: Part, pictures: str = ".") -> str:
    """A part as Markdown; `pictures` is their folder, as seen from the page."""
    if isinstance(part, Plot):
        return f"![{part.title}]({pictures}/{part.name}.png)\n\n{part.title}. {part.caption}"
    if isinstance(part, str):
        return part
    cells = part.cells()
    numbers = [cells[name].str.fullmatch(r"(-?[\d(].*)?").all() for name in cells]
    lines = [list(cells), ["---:" if number else "---" for number in numbers]]
    lines += cells.map(lambda text: text.replace("|", r"\|")).to_numpy().tolist()
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{part.note}"
    if part.folded:
        return f"<details><summary>{part.title}</summary>\n\n{table}\n\n</details>"
    return f"**{part.title}**\n\n{table}"


def html_page(parts: Sequence[Part]) -> str:
    """One page that needs nothing else: styles and pictures are in it."""
    body = "\n".join(map(_html, parts))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/><title>ConFu evaluation</title>'
        f"<style>{STYLE.read_text(encoding='utf-8')}</style></head><body><h1>ConFu evaluation</h1>\n{body}\n"
        "</body></html>\n"
    )


def _html(part: Part) -> str:
    if isinstance(part, Plot):
        source = f"data:image/png;base64,{base64.b64encode(part.png).decode()}"
        caption = _prose(f"{part.title}. {part.caption}")
        return f'<figure><img alt="{part.title}" src="{source}"/><figcaption>{caption}</figcaption></figure>'
    if isinstance(part, Table):
        table = part.cells().to_html(index=False, border=0)  # escapes what it holds
        is_open = "" if part.folded else ' open=""'
        return (
            f"<details{is_open}><summary>{html.escape(part.title)}</summary>"
            f'<div class="wide">{table}</div><p class="note">{_prose(part.note)}</p></details>'
        )
    heading = part.removeprefix("## ")
    return f"<p>{_prose(part)}</p>" if heading == part else f"<h2>{html.escape(heading)}</h2>"


def _prose(text: str) -> str:
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)
