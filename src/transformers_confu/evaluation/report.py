"""The report of a measurement: tables, plots, one self-contained HTML page and a Markdown one."""

import base64
import html
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from .aggregation import Comparison, settings_of
from .arms import Setting
from .plots import Plot, cost_plots, plots_of
from .records import RecordFile
from .tables import Table, curve_table, parameter_table, tables_of


COUNTING = [
    "Tokens are generated token ids up to and including EOS, the same for every arm; they are not counted from "
    "decoded text, and nothing beyond EOS or the limit is counted.",
    "Time is that of the whole call of `generate`, prefill included. All arms run in one process with the same "
    "attention kernel and kind of cache, and take turns on every question in a new random order.",
    "tau is tokens emitted in rounds / rounds, over all rounds of all texts. What the first forward, prefill, emits "
    "is in neither.",
    "Both speed-ups are given: total tokens over total time, and the mean over questions of the ratio to plain "
    "generation. (Spec-Bench prints a third: the mean of the questions' rates over the mean of plain generation's.)",
    "Turns follow the target's own chat template and an arm's own earlier answers. Where texts depart (bf16), later "
    "turns have other prompts: a departure is looked for up to the first.",
    "Spec-Bench's own harness counts otherwise: engine tokens against re-tokenised text, EOS overshoot of some "
    "methods, a limit of length for one method and not for plain generation, rounds that are one short, stale times "
    "after an error, one chat template for every model. Its numbers are not comparable with these.",
]

STYLE = """
:root { color-scheme: light dark; --ink: #222; --soft: #666; --line: #d8d8d2; --page: #fff; --band: #f5f5f1; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e2; --soft: #a2a29c; --line: #3c3c3a; --page: #1b1b1a; --band: #242423; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 70rem;
  margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 3rem; border-bottom: 1px solid var(--line); }
p.note, figcaption { color: var(--soft); font-size: .9rem; max-width: 55rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } tbody tr:nth-child(odd) { background: var(--band); }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; border-radius: 6px; }
pre { background: var(--band); padding: .8rem; overflow-x: auto; border-radius: 6px; }
"""


@dataclass
class Section:
    """A heading, and below it paragraphs, tables and plots in order."""

    title: str
    parts: list["str | Table | Plot | Preformatted"] = field(default_factory=list)


@dataclass
class Preformatted:
    """Text that keeps its line breaks, such as a command."""

    text: str


def write_report(file: RecordFile, folder: Path, command: str, seed: int) -> Path:
    r"""
    Write tables (`tables/*.csv`, `*.md`), plots (`plots/*.png`), `report.md` and `report.html`.

    Args:
        file ([`RecordFile`]): The records.
        folder (`Path`): Created if it is missing.
        command (`str`): What made the records, to be repeated by the reader.
        seed (`int`): Of the bootstrap.

    Returns:
        The path of the HTML page.
    """
    for name in ("tables", "plots"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    sections = [Section("What was measured", [*about(file, command), *COUNTING])]
    for setting in settings_of(file.answers):
        comparison = Comparison(setting, file.answers, seed)
        slug = _slug(setting)
        tables = tables_of(comparison, file.costs)
        plots = plots_of(comparison, folder / "plots", slug)
        for table in tables:
            _save(table, folder / "tables", slug)
        count = f"Questions: {len(comparison.questions)}. Runs: {len(comparison.runs)}."
        # What most readers want, then the pictures, then the details.
        sections.append(Section(str(setting), [count, *tables[:2], *plots, *tables[2:]]))
    general = [table for table in (curve_table(file.costs), parameter_table(file.costs)) if table is not None]
    for table in general:
        _save(table, folder / "tables", "")
    if general:
        sections.append(Section("Costs by themselves", [*general, *cost_plots(file.costs, folder / "plots")]))
    (folder / "report.md").write_text(markdown(sections, folder), encoding="utf-8")
    page = folder / "report.html"
    page.write_text(html_page(sections), encoding="utf-8")
    return page


def about(file: RecordFile, command: str) -> list["str | Preformatted"]:
    """What was measured, on what and by which command."""
    settings = file.settings
    machine = ", ".join(f"{name} {value}" for name, value in settings["machine"].items())
    # A draft in a folder is known by a digest of its weights, one on the Hub by its id.
    drafts = ", ".join(
        f"{name} ({print_[:12] if re.fullmatch('[0-9a-f]{64}', print_) else print_})"
        for name, print_ in settings["drafts"].items()
    )
    questions = (
        f"Questions: {settings['questions']['number']} (SHA-256 of their content "
        f"{settings['questions']['sha256'][:12]})"
    )
    if file.left_out:
        questions += f"; left out, as they exceed the target's context: {', '.join(file.left_out)} (ids)"
    if cut := {answer.question_id for answer in file.answers if answer.skipped_turns}:
        questions += f"; of {len(cut)} a later turn exceeded it"
    runs = len({answer.run for answer in file.answers})
    return [
        f"Target: {settings['target']}. Drafts, with the start of a digest of their weights: {drafts or 'none'}. "
        f"{questions}. Runs: {runs}.",
        f"Machine: {machine}.",
        f"Records: {file.name}, {len(file.answers):,} answers, SHA-256 {file.sha256()}.",
        Preformatted(command),
    ]


def _slug(setting: Setting) -> str:
    return f"{setting.dtype}_t{setting.temperature:g}_{setting.max_new_tokens}_".replace(".", "-")


def _save(table: Table, folder: Path, prefix: str) -> None:
    (folder / f"{prefix}{table.name}.csv").write_text(table.csv(), encoding="utf-8")
    page = f"### {table.title}\n\n{table.markdown()}\n\n{table.note}\n"
    (folder / f"{prefix}{table.name}.md").write_text(page, encoding="utf-8")


def markdown(sections: Iterable[Section], folder: Path, head: str = "# ConFu evaluation") -> str:
    """The report as Markdown under `head`; plots by their paths relative to `folder`."""
    lines = [head, ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        for part in section.parts:
            if isinstance(part, Table):
                lines += [f"### {part.title}", "", _unbroken(part.markdown()), "", part.note, ""]
            elif isinstance(part, Plot):
                path = part.path.relative_to(folder).as_posix()
                lines += [f"### {part.title}", "", f"![{part.title}]({path})", "", part.caption, ""]
            elif isinstance(part, Preformatted):
                lines += ["```", part.text, "```", ""]
            else:
                lines += [part, ""]
    return "\n".join(lines).rstrip() + "\n"


def _unbroken(table: str) -> str:
    """A table whose intervals and names such as `N = 16` are not broken into lines where the page is narrow."""
    table = re.sub(r"\((\S+) to (\S+)\)", "(\\1\u00a0to\u00a0\\2)", table)
    return table.replace(" = ", "\u00a0=\u00a0").replace("[con] ", "[con]\u00a0").replace("[f] ", "[f]\u00a0")


def html_page(sections: Iterable[Section]) -> str:
    """The report as one page that needs nothing else: styles and pictures are in it."""
    body = []
    for section in sections:
        body.append(f"<h2>{html.escape(section.title)}</h2>")
        for part in section.parts:
            if isinstance(part, Table):
                body.append(_html_table(part))
            elif isinstance(part, Plot):
                picture = base64.b64encode(part.path.read_bytes()).decode()
                body.append(
                    f"<h3>{html.escape(part.title)}</h3><figure><img alt={_quoted(part.title)} "
                    f'src="data:image/png;base64,{picture}"><figcaption>{_prose(part.caption)}</figcaption>'
                    "</figure>"
                )
            elif isinstance(part, Preformatted):
                body.append(f"<pre>{html.escape(part.text)}</pre>")
            else:
                body.append(f"<p>{_prose(part)}</p>")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>ConFu evaluation</title>'
        f"<style>{STYLE}</style></head><body><h1>ConFu evaluation</h1>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.cells()
    )
    return (
        f'<h3>{html.escape(table.title)}</h3><div class="wide"><table><thead><tr>{head}</tr></thead>'
        f'<tbody>{rows}</tbody></table></div><p class="note">{_prose(table.note)}</p>'
    )


def _prose(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def _quoted(text: str) -> str:
    return f'"{html.escape(text)}"'
