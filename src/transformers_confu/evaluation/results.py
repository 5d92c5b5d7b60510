"""`confu report`: several measurements on one Markdown page, short enough to be read from end to end.

The report of each measurement holds every table and picture of it; this page holds what a reader of results wants:
one table over all of them, groups of questions, pictures, costs, exactness, and how each was measured.
"""

import argparse
import json
from pathlib import Path

from .aggregation import Comparison, settings_of
from .plots import DRAWINGS, matplotlib_pyplot, plots_of, speedup_by_group
from .records import RecordFile
from .report import COUNTING, Section, about, markdown
from .tables import (
    curve_table,
    depth_table,
    difference_table,
    exactness_sentence,
    exactness_table,
    extra_cost_table,
    group_depth_table,
    group_difference_table,
    group_table,
    overview_table,
    parameter_table,
    rows_table,
    time_table,
)


MARK = "<!-- Written by `confu report` from here on; what stands above this line is kept. -->"
# There texts must be the same, and who also measures in half precision does so for its speed.
FULL_PRECISION = ("float32", "float64")


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="confu report",
        description="Write one Markdown page on several measurements of `confu evaluate`, with its pictures in a "
        "folder of the page's name beside it. Measurements of the same questions, target, drafts and machine share a "
        "table: name the one that the others vary first; it is also shown in detail.",
    )
    parser.add_argument("records", nargs="+", type=Path, help="JSONL files that `confu evaluate` wrote (also .gz)")
    parser.add_argument("--output", required=True, type=Path, help="the page, a .md file; text above its mark is kept")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: %(default)s)")
    arguments = parser.parse_args(argv)
    matplotlib_pyplot()
    write_results([RecordFile(path) for path in arguments.records], arguments.output, arguments.seed)
    print(arguments.output)


def write_results(files: list[RecordFile], output: Path, seed: int = 0) -> None:
    r"""
    Write the page, and its pictures as `<page without .md>/*.png`.

    Args:
        files (`list[RecordFile]`): The measurements; of those on the same questions, target, drafts and machine the
            first is shown in detail.
        output (`Path`): The page. What an earlier page holds above [`MARK`] is kept.
        seed (`int`): Of the bootstrap.

    Raises:
        ValueError: `output` is another file, or a measurement is empty.
    """
    before = "# Results\n"
    if output.suffix != ".md":
        raise ValueError(f"The output is {output}; expected a .md file.")
    if output.exists():
        before, mark, _ = output.read_text(encoding="utf-8").partition(MARK)
        if not mark:
            raise ValueError(f"{output} has no line {MARK!r}; add it where the results shall go, or delete the file.")
    for file in files:
        if not file.answers:
            raise ValueError(f"{file.path} holds no answers yet; run its `confu evaluate` first.")
    folder = output.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    page = markdown(sections_of(files, folder, seed), output.parent, head=f"{before.rstrip()}\n\n{MARK}")
    output.write_text(page, encoding="utf-8")


def sections_of(files: list[RecordFile], folder: Path, seed: int) -> list[Section]:
    """The page's sections; pictures are drawn into `folder`."""
    timed: dict[tuple, list[tuple[Comparison, RecordFile]]] = {}
    exact: list[Comparison] = []
    settings = {file.path: settings_of(file.answers) for file in files}
    any_half = any(setting.dtype not in FULL_PRECISION for of_file in settings.values() for setting in of_file)
    for file in files:
        alike = json.dumps([file.settings[name] for name in ("target", "drafts", "questions", "machine")])
        for setting in settings[file.path]:
            comparison = Comparison(setting, file.answers, seed)
            if setting.dtype in FULL_PRECISION:
                exact.append(comparison)
            if setting.dtype not in FULL_PRECISION or not any_half:
                key = (setting.dtype, setting.max_new_tokens, alike, *comparison.questions)
                timed.setdefault(key, []).append((comparison, file))
    sections: list[Section] = []
    for number, members in enumerate(timed.values()):
        comparisons = [comparison for comparison, _ in members]
        first, first_file = members[0]
        title = f"{len(first.questions)} questions, {first.setting.dtype}, up to {first.setting.max_new_tokens} tokens"
        section = Section(title, [overview_table(comparisons)])
        prefix = f"{len(first.questions)}_questions_"
        if title in [other.title for other in sections]:  # of another target, draft or machine, which is named below
            section.title += f" ({first_file.name})"
        if sum(len(other[0][0].questions) == len(first.questions) for other in timed.values()) > 1:
            prefix += f"{number}_"
        sections.append(section)
        if number == 0:
            section.parts += [difference_table(first), depth_table(first)]
            for drawing in DRAWINGS:  # each from the first measurement that has what it shows
                drawn = (plots_of(comparison, folder, prefix, [drawing]) for comparison in comparisons)
                section.parts += next(filter(None, drawn), [])
            section.parts += [group_depth_table(first)]
        else:
            section.parts += plots_of(first, folder, prefix, [speedup_by_group])
        section.parts += [
            group_table(first, "tau_by_group", "Accepted length (tau) by group", first.tau),
            group_difference_table(first),
            group_table(first, "speedup_by_group", "Speed-up by group", first.speedup_total),
        ]
        if number == 0:
            costs = Section(f"Costs of a round, {first.setting}")
            costs.parts += [time_table(first), extra_cost_table(first, first_file.costs), rows_table(first)]
            costs.parts += [curve_table(first_file.costs), parameter_table(first_file.costs)]
            sections.append(costs)
    exactness = Section("Exactness", [exactness_sentence(comparison) for comparison in exact])
    if any_half:
        first, _ = next(iter(timed.values()))[0]
        exactness.parts += [
            "In half precision kernels round differently with the number of rows, so that two nearly equal scores may "
            f"swap and a text part there. {first.setting}:",
            exactness_table(first),
        ]
    measured = Section("How it was measured", [*COUNTING])
    for file in files:
        measured.parts += [f"**{file.name}**", *about(file, file.settings.get("command") or "not recorded")]
    sections += [exactness, measured]
    for section in sections:
        section.parts = [part for part in section.parts if part is not None]
    return sections
