"""
The report on one measurement or several: a conclusion in words, tables and plots, as a Markdown page and as one HTML
page that needs no other file. `confu report` and `confu evaluate --report` both write it.
"""

import argparse
import base64
import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from ..common.texts import TIE
from .figures import CACHES, Comparison, Interval, Spread, comparisons_of
from .metrics.confu_acceptance import acceptance
from .plots import Plot, draw, forward_curve, round_costs, speedup_by_group, survival, sweep
from .records import RecordFile


MARK = "<!-- Written by `confu report` from here on; what stands above this line is kept. -->"
FULL_PRECISION = ("float32", "float64")  # there texts must be plain generation's
KEYS = ("records", "questions", "dtype", "limit", "T")  # columns that are left out where all rows agree

INTERVALS = (
    "In round brackets the 95 % interval of a paired bootstrap over questions, stratified by group (*: of fewer than "
    "10 questions, and less certain than it looks); in square brackets the lowest and highest of several runs."
)
CONTEMPLATION_PARTS = {
    "rows": "contemplate rows",
    "slots": "soft-prompt slots",
    "contemplate_experts": "experts of [con]",
    "future_experts": "experts of [f]",
    "projections": "projections of f",
}
COUNTING = [
    "Tokens are generated token ids up to and including EOS, the same for every arm; they are not counted from "
    "decoded text, and nothing beyond EOS or the limit is counted.",
    "Time is that of the whole call of `generate`, prefill included. All arms run in one process with the same "
    "attention kernel and kind of cache, and take turns on every question in a new random order.",
    "tau is tokens emitted in rounds / rounds, over all rounds of all texts. What the first forward, prefill, emits "
    "is in neither. It is the tau of a tree, decoded for real. The `tau_greedy` that `confu train` logs is another "
    "figure: teacher-forced, on the answers in the training data, and of a chain, the draft's first choice at each "
    "step. A tree keeps several choices, so its tau is higher at the same depth; compare each with its own kind only.",
    "Both speed-ups are given: total tokens over total time, and the mean over questions of the ratio to plain "
    "generation. (Spec-Bench prints a third: the mean of the questions' rates over the mean of plain generation's.)",
    "Turns follow the target's own chat template and an arm's own earlier answers. Where texts depart (bf16), later "
    "turns have other prompts: a departure is looked for up to the first.",
    "Spec-Bench's own harness counts otherwise: engine tokens against re-tokenised text, EOS overshoot of some "
    "methods, a limit of length for one method and not for plain generation, rounds that are one short, stale times "
    "after an error, one chat template for every model. Its numbers are not comparable with these.",
]


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
        help="a folder for report.html, report.md, tables as CSV and pictures; or a .md file, for that page alone, "
        "whose text above its mark is kept, with its pictures in a folder of its name",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: %(default)s)")
    arguments = parser.parse_args(argv)
    for path in arguments.records:
        if not path.is_file():
            raise ValueError(f"There is no file {path}; give the `output` of a `confu evaluate`.")
    print(write_report([RecordFile(path) for path in arguments.records], arguments.output, arguments.seed))


def write_report(files: Sequence[RecordFile], output: Path, seed: int = 0) -> Path:
    r"""
    Write the report.

    Args:
        files (`Sequence[RecordFile]`): The measurements, the main one first.
        output (`Path`): A folder, or a .md file (see the command's help).
        seed (`int`): Of the bootstrap.

    Returns:
        The path of the page.

    Raises:
        ValueError: a measurement is empty, or `output` is a file of another kind.
    """
    is_page = output.suffix == ".md"
    if not is_page and (output.suffix or output.is_file()):
        raise ValueError(f"The output is {output}; expected a folder or a .md file.")
    page = output if is_page else output / "report.md"
    pictures = page.with_suffix("") if is_page else output
    before = "# ConFu evaluation\n"
    if page.exists():
        before, mark, _ = page.read_text(encoding="utf-8").partition(MARK)
        if not mark:
            raise ValueError(f"{page} has no line {MARK!r}; add it where the results shall go, or delete the file.")
    parts = report_parts(files, seed)
    pictures.mkdir(parents=True, exist_ok=True)
    for part in parts:
        if isinstance(part, Plot):
            (pictures / f"{part.name}.png").write_bytes(part.png)
        elif isinstance(part, Table) and not is_page:
            (output / f"{part.name}.csv").write_text(part.csv(), encoding="utf-8")
    text = "\n\n".join(markdown(part, pictures.name if is_page else ".") for part in parts)
    page.write_text(f"{before.rstrip()}\n\n{MARK}\n\n{text}\n", encoding="utf-8")
    if is_page:
        return page
    (output / "report.html").write_text(html_page(parts), encoding="utf-8")
    return output / "report.html"


# --- what stands on the page


@dataclass
class Table:
    r"""
    Args:
        name (`str`): Of its CSV file.
        title (`str`): What it shows.
        note (`str`): What the figures are and how they were counted.
        rows (`list[dict]`): Cells by column: text, numbers, [`Interval`] or [`Spread`].
        digits (`int`): Decimals of numbers that are no counts.
        folded (`bool`): A detail that is opened by a click.
    """

    name: str
    title: str
    note: str
    rows: list[dict[str, Any]]
    digits: int = 2
    folded: bool = False

    @property
    def frame(self) -> pd.DataFrame:
        frame = pd.DataFrame(self.rows, dtype=object)
        return frame.drop(columns=[key for key in KEYS if key in frame and frame[key].nunique() == 1])

    def cells(self) -> pd.DataFrame:
        """The cells as text."""

        def text(cell: Any) -> str:
            if isinstance(cell, Interval | Spread):
                return format(cell, f".{self.digits}f")
            if cell is None or cell != cell:
                return ""
            return (
                f"{cell:.{self.digits}f}"
                if isinstance(cell, float)
                else f"{cell:,}"
                if isinstance(cell, int)
                else cell
            )

        return self.frame.map(text)

    def is_text(self, column: str) -> bool:
        """Whether a column is set to the left."""
        return column in KEYS or all(isinstance(cell, str) for cell in self.frame[column])

    def csv(self) -> str:
        """Full precision; an interval or a spread takes three columns."""
        columns = {}
        for name, cells in self.frame.items():
            columns[name] = [cell.value if isinstance(cell, Interval | Spread) else cell for cell in cells]
            kinds = {type(cell) for cell in cells}
            for kind, bounds in ((Interval, ("95 % low", "95 % high")), (Spread, ("lowest run", "highest run"))):
                if kind in kinds:
                    for bound, place in zip(bounds, (1, 2), strict=True):
                        columns[f"{name}, {bound}"] = [
                            cell[place] if isinstance(cell, kind) else None for cell in cells
                        ]
        return pd.DataFrame(columns).to_csv(index=False)


@dataclass
class Heading:
    text: str


@dataclass
class Code:
    """Text that keeps its line breaks, such as a command."""

    text: str


Part = str | Heading | Code | Table | Plot


def report_parts(files: Sequence[RecordFile], seed: int = 0) -> list[Part]:
    """All that stands on the page, in order."""
    everything = comparisons_of(files, seed)
    # Who also measures in half precision does so for its speed, and in full precision for the texts.
    half = {c.file.path for c in everything if c.setting.dtype not in FULL_PRECISION}
    timed = [c for c in everything if c.file.path in half or not half]
    costs = [cost for file in files for cost in file.costs]
    parts: list[Part | None] = [
        *map(conclusion, timed),
        Heading("Speed and accepted length"),
        speed_table(timed),
        _first(timed, speedup_by_group),
        *(
            _first(timed, partial(sweep, knob=knob), knob)
            for knob in ("tree_size", "depth", "branching", "contemplation")
        ),
        group_table(timed),
        Heading("What the draft predicts"),
        difference_table(timed),
        depth_table(timed),
        _first(timed, survival),
        group_depth_table(timed),
        Heading("What a round costs"),
        time_table(timed),
        _first(timed, round_costs),
        contemplation_table(timed),
        curve_table(costs),
        draw(forward_curve, costs),
        memory_table(timed),
        parameter_table(costs),
        Heading("Texts against plain generation's"),
        *(exactness_sentence(c) for c in everything if c.setting.dtype in FULL_PRECISION),
        exactness_table(everything),
        Heading("How it was measured"),
        *COUNTING,
    ]
    for file in files:
        parts += about(file)
    return [part for part in parts if part is not None and not (isinstance(part, Table) and not part.rows)]


def _first(comparisons: Iterable[Comparison], drawing: Any, name: str | None = None) -> Plot | None:
    """The picture of the first comparison that has what it shows."""
    return next(filter(None, (draw(drawing, comparison, name=name) for comparison in comparisons)), None)


def conclusion(c: Comparison) -> str:
    """Which arm was fastest, by how much, and what to set."""
    speedups = c.speedup_total()
    best = str(speedups.loc[0].idxmax())
    arm, fastest = c.arms[best], c.interval(speedups[best])
    if best == c.plain:
        nearest = speedups.loc[0].drop(best)
        others = f" ({nearest.idxmax()}: {nearest.max():.2f} times its speed)" if len(nearest) else ""
        return f"**{c}**: nothing was faster than plain `generate`{others}. Decode without a draft."
    tau = c.interval(c.tau()[best])
    text = f"**{c}**: fastest is **{best}**, {fastest:.2f} times plain `generate`, with a tau of {tau:.2f}."
    if not fastest.low > 1:
        text += " That is not certainly faster than plain `generate`."
    equal = [
        other for other in c.arms
        if other not in (best, c.plain) and not c.interval(speedups[best] / speedups[other]).low > 1
    ]  # fmt: skip
    if equal:
        text += f" Not certainly slower: {'; '.join(equal)}."
    if arm.kind == "draft" and not arm.knobs:
        text += " It is what you get without setting a knob."
    elif arm.kind == "draft":
        text += " To set it: " + ", ".join(f"`{name}={value}`" for name, value in arm.knobs.items()) + "."
    elif arm.kind == "prompt_lookup":
        text += f" To set it: `prompt_lookup_num_tokens={c.file.settings['prompt_lookup_tokens']}`."
    contemplating = [other for other in c.drafted if c.arms[other].contemplation != 0]
    for other in sorted(contemplating, key=lambda name: -speedups[name][0])[:1]:
        for reference in c.references(other)[:1]:
            change, factor = _against(c, other, reference)
            text += f" Future predictions ({other}) change tau by {change:.2f} and speed by the factor {factor:.2f}."
    return text


def _against(c: Comparison, arm: str, other: str, group: str | None = None) -> tuple[Interval, Interval]:
    """Difference in tau and quotient of speed of two arms."""
    tau, rate = c.tau(group), c.rate(group)
    return c.interval(tau[arm] - tau[other], group), c.interval(rate[arm] / rate[other], group)


def _keys(c: Comparison) -> dict[str, Any]:
    limits = {"dtype": c.setting.dtype, "limit": c.setting.max_new_tokens, "T": f"{c.setting.temperature:g}"}
    return {"records": c.file.name, "questions": len(c.questions)} | limits


def _identical(c: Comparison, name: str) -> str:
    answers = c.of(name)
    return f"{len(answers) - answers['departs'].sum()}/{len(answers)}"


def speed_table(comparisons: list[Comparison]) -> Table:
    rows = []
    for c in comparisons:
        by_run = c.by_run()
        for name, arm in c.arms.items():
            own = (
                [other for other in c.references(name) if c.arms[other].draft == arm.draft]
                if arm.contemplation != 0
                else []
            )
            rates, speedups = by_run[name]
            rows.append(
                _keys(c)
                | {
                    "N": arm.tree_size,
                    "depth": arm.depth,
                    "branching": arm.branching,
                    "arm": f"{arm.draft}: {arm.mode}" if name.startswith(f"{arm.draft}:") else arm.mode,
                    "tau": c.interval(c.tau()[name]),
                    "against EAGLE-3 mode": _against(c, name, own[0])[0] if own else None,
                    "tokens/s": rates,
                    "speed-up": c.interval(c.speedup_total()[name]),
                    "by run": f"{speedups.low:.2f} to {speedups.high:.2f}" if speedups.low < speedups.high else "",
                    "mean of ratios": c.interval(c.speedup_mean()[name]),
                    "equal": _identical(c, name),
                }
            )
    return Table(
        "speed",
        "Accepted length and speed of every arm",
        "T: temperature. N, depth, branching: the tree. C: contemplate rows. tau: tokens emitted in rounds / rounds; "
        "beside it its difference from EAGLE-3 mode of the same draft and tree. Speed-up: against plain generate in "
        "the same measurement, total tokens over total time of all runs; its lowest and highest run, where there were "
        "several; the mean of the questions' ratios. tokens/s: median of the runs. Equal: texts that are plain "
        f"generate's. {INTERVALS}" + _if_sampled(comparisons),
        rows,
    )


def _if_sampled(comparisons: Iterable[Comparison]) -> str:
    if all(c.setting.temperature == 0 for c in comparisons):
        return ""
    return (
        " When sampling, prompt lookup and assistant models draw along their own way: their texts follow the same law "
        "and are others."
    )


def group_table(comparisons: list[Comparison]) -> Table:
    rows = []
    for title, figure in (
        ("tau", Comparison.tau),
        ("speed-up, total", Comparison.speedup_total),
        ("speed-up, mean", Comparison.speedup_mean),
        ("tokens/s", Comparison.rate),
    ):
        for c in comparisons:
            samples = {group: figure(c, group) for group in (*c.groups, None)}
            for name, arm in c.arms.items():
                if arm.kind != "plain":
                    cells = {group or "all": c.interval(samples[group][name], group) for group in samples}
                    rows.append({"figure": title, **_keys(c), "arm": name} | cells)
    counts = {group: len(members) for c in comparisons[:1] for group, members in c.groups.items()}
    return Table(
        "groups",
        "Accepted length and speed by group of questions",
        f"Questions: {', '.join(f'{group} {count}' for group, count in counts.items())}"
        f"{' (of the first records)' if len(comparisons) > 1 else ''}. {INTERVALS}",
        rows,
        folded=True,
    )


def difference_table(comparisons: list[Comparison]) -> Table:
    rows = []
    for c in comparisons:
        for name in c.drafted:
            for other in c.references(name):
                change, factor = _against(c, name, other)
                speedups = c.speedup_total()
                rows.append(
                    {**_keys(c), "arm": name, "against": other, "tau, difference": change, "speed, quotient": factor}
                    | {"speed-up, difference": c.interval(speedups[name] - speedups[other])}
                    | {f"tau, {group}": _against(c, name, other, group)[0] for group in c.groups}
                )
    return Table(
        "differences",
        "Against EAGLE-3 mode with the same tree",
        f"Differences of tau over all questions and by group. {INTERVALS} Where an interval leaves out 0 (or, for the "
        "quotient, 1), the two arms differ beyond what other questions of the same kind would change.",
        rows,
        digits=3,
    )


def _by_depth(values: list[Any], depth: int, beyond: Any) -> dict[str, Any]:
    """Columns up to the tree's depth; `beyond` where no round came that far."""
    return {f"l = {level}": value for level, value in enumerate([*values, *[beyond] * (depth - len(values))], start=1)}


def depth_table(comparisons: list[Comparison]) -> Table:
    rows = []
    for c in comparisons:
        for name in c.drafted:
            result = acceptance(c.of(name)["by_round"], c.of(name)["accepted"])
            depth = c.depth(name)
            lines = {
                "P(accepted >= l)": _by_depth(result["survival"], depth, 0.0),
                "given l - 1": _by_depth(result["conditional"], depth, None),
                f"of {result['rounds']:,} rounds": _by_depth(result["accepted_by_depth"], depth, 0),
            }
            rows += [{**_keys(c), "arm": name, "": title} | cells for title, cells in lines.items()]
    return Table(
        "acceptance",
        "Acceptance by draft step",
        "Up to the tree's depth, over all rounds, the last of a text included, which its end may cut short. The "
        "second line of an arm is the share of the rounds that accepted l - 1 tokens which also accepted the next, the third "
        "the number of rounds that accepted l. These are steps of a tree; `tau_greedy` of training's log follows a "
        "chain on given answers and is lower (see the end of this page).",
        rows,
        digits=3,
    )


def group_depth_table(comparisons: list[Comparison]) -> Table:
    rows = []
    for c in comparisons:
        for name in c.drafted:
            for group in c.groups:
                answers = c.of(name, group)
                shares = acceptance(answers["by_round"], answers["accepted"])["survival"]
                rows.append({**_keys(c), "arm": name, "group": group} | _by_depth(shares, c.depth(name), 0.0))
    title = "P(accepted >= l) by group of questions"
    return Table("acceptance_by_group", title, "Over all rounds of the group.", rows, digits=3, folded=True)


def time_table(comparisons: list[Comparison]) -> Table:
    rows = []
    for c in comparisons:
        for name in c.drafted:
            if parts := c.round_parts(name):
                rows.append({**_keys(c), "arm": name} | {part: 1000 * seconds for part, seconds in parts.items()})
    return Table(
        "time",
        "Where the time goes, milliseconds per round",
        "Rest: what `generate` does besides, its preparation of the call included. Prefill is per call. Read by the "
        "host's clock: on a GPU, work queued in one part may be waited for in a later one.",
        rows,
    )


def contemplation_table(comparisons: list[Comparison]) -> Table:
    """What each part of contemplation adds to a round, and to each token of a round that emits 1, 2, ..."""
    rows = []
    context = 0
    for c in comparisons:
        arms = {arm: name for name, arm in c.arms.items()}
        for cost in c.file.costs:
            name = next((n for arm, n in arms.items() if cost["arm"] and vars(arm) == cost["arm"]), None)
            if cost["dtype"] != c.setting.dtype or name is None or not c.round_parts(name):
                continue
            context = cost["context"]
            parts = {title: cost["per_round"][part] for part, title in CONTEMPLATION_PARTS.items()}
            parts["sum"] = sum(parts.values())
            for other in c.references(name):
                if c.arms[other].draft == c.arms[name].draft and c.round_parts(other):
                    parts["in the answers"] = c.round_parts(name)["round"] - c.round_parts(other)["round"]
            for title, seconds in parts.items():
                by_tokens = {f"/{n}": 1000 * seconds / n for n in range(1, c.depth(name) + 2)}
                rows.append({**_keys(c), "arm": name, "": title, "a round": 1000 * seconds} | by_tokens)
    return Table(
        "contemplation",
        "What contemplation adds, milliseconds",
        "Per round, and divided by its tokens where it emits 1, 2, ..., up to the tree's depth + 1. Rows and slots: "
        f"forwards of the target over a context of {context} tokens, medians, whose differences carry the machine's "
        "noise. Experts and projections: inside a real call. In the answers: how much longer the rounds above were "
        "than in EAGLE-3 mode of the same draft.",
        rows,
    )


def memory_table(comparisons: list[Comparison]) -> Table:
    rows = []
    for c in comparisons:
        for name, arm in c.arms.items():
            answers = c.of(name)
            row = {**_keys(c), "arm": name}
            if arm.kind == "draft" and answers["rounds"].sum():
                rounds = answers["rounds"].sum()
                row |= {"nodes": answers["tree_nodes"].sum() / rounds}
                row |= {"contemplate rows": answers["contemplate_rows"].sum() / rounds}
                row |= {
                    cache.removesuffix("_cache_bytes") + " KV": float(answers[cache].max() / 2**20) for cache in CACHES
                }
            rows.append(row | {"peak": float(answers["peak"].max() / 2**20)})
    return Table(
        "memory",
        "Rows per forward, and memory in MiB",
        "Nodes (the root is one) and contemplate rows: means over the rounds. Keys and values of the longest text: "
        "the target's, the draft's, and what a round adds to the target's until it is compacted (tree nodes, "
        "contemplate rows, soft prompts). Peak: most memory in use during a call, all weights included; on a "
        "CPU, of the process, which keeps what earlier calls freed.",
        rows,
        folded=True,
    )


def curve_table(costs: list[dict[str, Any]]) -> Table:
    curves = [cost for cost in costs if "points" in cost]
    context = curves[0]["context"] if curves else 0
    return Table(
        "forward_curve",
        "The target's forward over the rows of a tree, milliseconds",
        f"Median; context of {context} tokens, explicit tree mask, logits of every row.",
        [{"": cost["dtype"]} | {str(rows): 1000 * seconds for rows, seconds in cost["points"]} for cost in curves],
        digits=1,
    )


def parameter_table(costs: list[dict[str, Any]]) -> Table:
    rows: dict[str, dict[str, Any]] = {}
    for cost in costs:
        if "parameters" in cost:
            sizes = cost["parameters"]
            row = {"draft": cost["arm"]["draft"], **sizes, "all": sum(sizes.values())}
            rows.setdefault(cost["arm"]["draft"], row | {"slots": cost["slot_bytes"] / 2**20})
    return Table(
        "parameters",
        "Parameters of the drafts",
        "Embeddings that a draft reads from the target are not counted. Slots: the soft prompts' bytes, in MiB.",
        list(rows.values()),
        folded=True,
    )


def exactness_sentence(c: Comparison) -> str:
    """Whether the texts of all drafts are plain generate's, and if not, by how much they part."""
    answers = c.answers[c.answers["arm"].isin(c.drafted)]
    apart = answers[answers["departs"]]
    sentence = (
        f"{c.setting}: {len(answers) - len(apart)} of {len(answers)} answers ({len(c.questions)} questions, "
        f"{len(c.drafted)} arms with a draft) are plain generate's, token for token"
    )
    if apart["gap"].notna().any():
        sentence += (
            f"; at the first other token the target's logits of the two lie at most {apart['gap'].max():.2g} apart"
        )
    if c.setting.temperature == 0 and apart["gap"].isna().any():
        sentence += f"; {apart['gap'].isna().sum()} end elsewhere"
    return sentence + "."


def exactness_table(comparisons: list[Comparison]) -> Table:
    rows = []
    for c in comparisons:
        for name in c.arms:
            answers = c.of(name)
            apart = answers[answers["departs"]]
            row = {**_keys(c), "arm": name, "answers": len(answers), "identical": int(len(answers) - len(apart))}
            row["position"] = int(apart["position"].median()) if len(apart) else None
            row |= {"gap, median": float(apart["gap"].median()), "gap, largest": float(apart["gap"].max())}
            row[f"above {TIE:g}"] = None
            if c.setting.dtype in FULL_PRECISION and c.setting.temperature == 0:
                # A text that ends where the other goes on has no gap, and no tie explains it.
                row[f"above {TIE:g}"] = int((apart["gap"].isna() | (apart["gap"] > TIE)).sum())
            if name != c.plain:
                rows.append(row)
    return Table(
        "exactness",
        "Where texts part from plain generate's",
        "An answer departs where its first token differs. Position: of that token in its turn, median. Gap: how far "
        "apart the target's logits of the two tokens are there, in one forward over the common text; not measured "
        f"when sampling. In fp32 rounding explains a gap of up to {TIE:g}, a tie; a larger one would be an error, and "
        "so would a text that ends where the other goes on, which counts among them. In half precision kernels round "
        "differently with the number of rows, so that two nearly equal scores may swap and a text part there."
        + _if_sampled(comparisons),
        rows,
        digits=4,
    )


def about(file: RecordFile) -> list[Part]:
    """What was measured, on what and by which command."""
    settings = file.settings
    # A draft in a folder is known by a digest of its weights, one on the Hub by its id.
    drafts = ", ".join(
        f"{name} ({mark[:12] if re.fullmatch('[0-9a-f]{64}', mark) else mark})"
        for name, mark in settings["drafts"].items()
    )
    asked = settings["questions"]
    questions = f"Questions: {asked['number']} (SHA-256 of their content {asked['sha256'][:12]})"
    if file.left_out:
        questions += f"; left out, as they exceed the target's context: {', '.join(file.left_out)} (ids)"
    if cut := {unit["question_id"] for unit, answer in file.answers if answer["skipped_turns"]}:
        questions += f"; of {len(cut)} a later turn exceeded it"
    runs = len({run for _, run, _ in file.units})
    count = sum(1 for _ in file.answers)
    return [
        f"**{file.name}**. Target: {settings['target']}. Drafts, with the start of a digest of their weights: "
        f"{drafts or 'none'}. {questions}. Runs: {runs}.",
        f"Machine: {', '.join(f'{name} {value}' for name, value in settings['machine'].items())}. Records: "
        f"{file.path.name.removesuffix('.gz')}, {count:,} answers, SHA-256 {file.sha256()}.",
        Code(settings.get("command") or "not recorded"),
    ]


# --- two forms of a page


def markdown(part: Part, pictures: str) -> str:
    """A part as Markdown; `pictures` is their folder, as seen from the page."""
    if isinstance(part, Heading):
        return f"## {part.text}"
    if isinstance(part, Code):
        return f"```\n{part.text}\n```"
    if isinstance(part, Plot):
        return f"![{part.title}]({pictures}/{part.name}.png)\n\n{part.title}. {part.caption}"
    if isinstance(part, Table):
        cells = part.cells()
        rule = ["---" if part.is_text(column) else "---:" for column in cells]
        lines = [list(cells), rule, *cells.to_numpy().tolist()]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{part.note}"
        if part.folded:
            return f"<details><summary>{part.title}</summary>\n\n{table}\n\n</details>"
        return f"**{part.title}**\n\n{table}"
    return part


def html_page(parts: Iterable[Part]) -> str:
    """One page that needs nothing else: styles and pictures are in it."""
    body = "\n".join(_html(part) for part in parts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>ConFu evaluation</title>'
        f"<style>{STYLE}</style></head><body><h1>ConFu evaluation</h1>\n{body}\n</body></html>\n"
    )


def _html(part: Part) -> str:
    if isinstance(part, Heading):
        return f"<h2>{html.escape(part.text)}</h2>"
    if isinstance(part, Code):
        return f"<pre>{html.escape(part.text)}</pre>"
    if isinstance(part, Plot):
        source = f"data:image/png;base64,{base64.b64encode(part.png).decode()}"
        caption = _prose(f"{part.title}. {part.caption}")
        return (
            f'<figure><img alt="{html.escape(part.title)}" src="{source}"><figcaption>{caption}</figcaption></figure>'
        )
    if isinstance(part, Table):
        cells = part.cells()
        sides = ["" if part.is_text(column) else ' class="number"' for column in cells]

        def line(tag: str, texts: Iterable[str]) -> str:
            pairs = zip(sides, texts, strict=True)
            return "<tr>" + "".join(f"<{tag}{side}>{html.escape(text)}</{tag}>" for side, text in pairs) + "</tr>"

        rows = [line("th", cells), *(line("td", row) for row in cells.to_numpy().tolist())]
        return (
            f"<details{'' if part.folded else ' open'}><summary>{html.escape(part.title)}</summary>"
            f'<div class="wide"><table>{"".join(rows)}</table></div><p class="note">{_prose(part.note)}</p></details>'
        )
    return f"<p>{_prose(part)}</p>"


def _prose(text: str) -> str:
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)


STYLE = """
:root { color-scheme: light dark; --soft: #777; --line: #8884; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
.note, figcaption { color: var(--soft); font-size: .9rem; }
.wide, pre { overflow-x: auto; }
summary { font-weight: 600; margin-top: 1rem; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
.number { text-align: right; }
figure { margin: 1.5rem 0; } img { max-width: 100%; }
"""
