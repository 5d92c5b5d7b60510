"""The report's tables: what each says, over all comparisons of a report at once."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ..common.texts import TIE
from .figures import CACHES, Comparison, Interval


FULL_PRECISION = ("float32", "float64")  # there texts must be plain generation's
KEYS = ("records", "questions", "dtype", "limit", "T")  # columns that are left out where all rows agree
INTERVALS = (
    "In round brackets the 95 % interval of a paired bootstrap over questions, stratified by group (*: of fewer than "
    "10 questions, and less certain than it looks)."
)
SAMPLED = (
    "When sampling, prompt lookup and assistant models draw along their own way: their texts follow the same law and "
    "are others."
)
MIXTURES = {
    "contemplate_experts": "experts of [con]",
    "future_experts": "experts of [f]",
    "projections": "projections of f",
}

Row = dict[str, Any]


@dataclass
class Table:
    """What a table shows, what its figures are and how they were counted."""

    title: str
    note: str
    rows: list[Row]  # cells by column: text, numbers or intervals
    digits: int = 2  # of numbers that are no counts
    folded: bool = False  # a detail that is opened by a click

    def cells(self) -> pd.DataFrame:
        """The cells as text, without empty columns."""

        def text(cell: Any) -> str:
            if isinstance(cell, Interval | float):
                return "" if cell != cell else format(cell, f".{self.digits}f")
            return "" if cell is None else f"{cell:,}" if isinstance(cell, int) else str(cell)

        frame = pd.DataFrame(self.rows, dtype=object).map(text)
        same = [key for key in KEYS if key in frame and frame[key].nunique() == 1]
        return frame.loc[:, (frame != "").any()].drop(columns=same)


def _rows(
    comparisons: Iterable[Comparison], cells: Callable[[Comparison, str], Row | list[Row]], drafts_only: bool = True
) -> list[Row]:
    """The rows that `cells` makes of every arm, behind what says which arm that is."""
    rows = []
    for c in comparisons:
        setting = {"dtype": c.setting.dtype, "limit": c.setting.max_new_tokens, "T": f"{c.setting.temperature:g}"}
        keys = {"records": c.file.name, "questions": len(c.questions), **setting}
        for arm in c.drafted if drafts_only else c.arms:
            made = cells(c, arm)
            rows += [keys | {"arm": arm} | row for row in (made if isinstance(made, list) else [made]) if row]
    return rows


def against(c: Comparison, arm: str, other: str, group: str | None = None) -> tuple[Interval, Interval]:
    """Difference in tau and quotient of speed of two arms."""
    tau, rate = c.tau(group), c.rate(group)
    return c.interval(tau[arm] - tau[other], group), c.interval(rate[arm] / rate[other], group)


def speed_table(comparisons: list[Comparison]) -> Table:
    def cells(c: Comparison, name: str) -> Row:
        arm, answers, runs = c.arms[name], c.of(name), c.by_run(name)
        several, (lowest, highest) = len(runs) > 1, (runs.min(), runs.max())
        return {
            "N": arm.tree_size,
            "depth": arm.depth,
            "branching": arm.branching,
            "tau": c.interval(c.tau()[name]),
            "tokens/s": runs["rate"].median(),
            "tokens/s by run": f"{lowest['rate']:.2f} to {highest['rate']:.2f}" if several else "",
            "speed-up": c.interval(c.speedup_total()[name]),
            "by run": f"{lowest['speedup']:.2f} to {highest['speedup']:.2f}" if several and name != c.plain else "",
            "mean of ratios": c.interval(c.speedup_mean()[name]),
            "one forward": c.limit(name),
            "equal": f"{len(answers) - answers['departs'].sum()}/{len(answers)}",
        }

    return Table(
        "Accepted length and speed of every arm",
        "T: temperature. N, depth, branching: the tree. C: contemplate rows. tau: tokens emitted in rounds / rounds. "
        "tokens/s: median of the runs. Speed-up: against plain generate in the same measurement, total tokens over "
        "total time of all runs; the mean of the questions' ratios. By run: the lowest and the highest of several. "
        "One forward: the speed-up if a round took one forward of the target over its rows and nothing else. "
        f"Equal: texts that are plain generate's. {INTERVALS} {SAMPLED}",
        _rows(comparisons, cells, drafts_only=False),
    )


def group_table(comparisons: list[Comparison]) -> Table:
    figures = {
        "tau": Comparison.tau,
        "speed-up, total": Comparison.speedup_total,
        "speed-up, mean": Comparison.speedup_mean,
    }

    def cells(c: Comparison, name: str) -> list[Row]:
        if name == c.plain or len(c.groups) == 1:
            return []
        return [
            {"figure": title} | {group: c.interval(figure(c, group)[name], group) for group in c.groups}
            for title, figure in figures.items()
        ]

    counts = [", ".join(f"{group} {len(members)}" for group, members in c.groups.items()) for c in comparisons]
    return Table(
        "Accepted length and speed by group of questions",
        f"Questions: {'; or '.join(dict.fromkeys(counts))}. {INTERVALS}",
        _rows(comparisons, cells, drafts_only=False),
        folded=True,
    )


def difference_table(comparisons: list[Comparison]) -> Table:
    def cells(c: Comparison, name: str) -> list[Row]:
        rows = []
        for other in c.references(name):
            change, factor = against(c, name, other)
            row = {"against": other, "speed, quotient": factor, "tau, difference": change}
            rows.append(row | {f"tau, {group}": against(c, name, other, group)[0] for group in c.groups})
        return rows

    return Table(
        "Against EAGLE-3 mode with the same tree",
        f"Differences of tau over all questions and by group. {INTERVALS} Where an interval leaves out 0 (or, for the "
        "quotient, 1), the two arms differ beyond what other questions of the same kind would change.",
        _rows(comparisons, cells),
        digits=3,
    )


def earlier_table(comparisons: list[Comparison], earlier: list[Comparison]) -> Table:
    """
    The drafts' arms against those with the same knobs in `earlier` records, of the same questions and under the same
    setting. ValueError for earlier records that have no such arm.
    """

    def cells(c: Comparison, name: str) -> list[Row]:
        rows = []
        for other in earlier:
            if (other.setting, other.file.asked, other.questions) != (c.setting, c.file.asked, c.questions):
                continue
            for theirs in other.drafted:
                if other.arms[theirs].knobs != c.arms[name].knobs:
                    continue
                now, then = c.tau()[name], other.tau()[theirs]
                row = {"tau": c.interval(now), "earlier": other.file.name, "its tau": then[0]}
                row["difference"] = c.interval(now - then)
                for group in c.groups:
                    row[group] = c.interval(c.tau(group)[name] - other.tau(group)[theirs], group)
                rows.append(row)
        return rows

    rows = _rows(comparisons, cells)
    if strangers := {other.file.name for other in earlier} - {row["earlier"] for row in rows}:
        raise ValueError(
            f"The earlier records {', '.join(sorted(strangers))} have no draft with the knobs, setting and questions "
            "of these; expected those of the same `confu evaluate`, with another draft or by another build."
        )
    return Table(
        "Against earlier records",
        "tau here and in earlier records of the same questions, knobs and setting, with another draft or by another "
        f"build, and their difference, over all questions and by group. {INTERVALS} Where an interval leaves out 0, "
        "they differ beyond what other questions of the same kind would change. In half precision the texts of both "
        "part, which moves tau as well; in fp32 they are the same.",
        rows,
    )


def acceptance_table(comparisons: list[Comparison]) -> Table:
    def cells(c: Comparison, name: str) -> list[Row]:
        result = c.acceptance(name)
        return [
            {"rounds": result["rounds"], "": title} | {f"l = {level}": value for level, value in enumerate(values, 1)}
            for title, values in (("P(accepted >= l)", result["survival"]), ("given l - 1", result["conditional"]))
        ]

    return Table(
        "Acceptance by draft step",
        "Up to the tree's depth, over all rounds, the last of a text included, which its end may cut short. The "
        "second line of an arm is the share of the rounds that accepted l - 1 tokens which also accepted the next. "
        "These are steps of a tree; `tau_greedy` of training's log follows a chain on given answers (see the end of "
        "this page).",
        _rows(comparisons, cells),
        digits=3,
        folded=True,
    )


def time_table(comparisons: list[Comparison]) -> Table:
    return Table(
        "Where the time goes, milliseconds per round",
        "Target: its forward. Rest: what `generate` does besides, its preparation of the call included. Prefill is "
        "per call. Read by the host's clock: on a GPU, work queued in one part may be waited for in a later one.",
        _rows(comparisons, lambda c, name: {part: 1000 * taken for part, taken in c.round_parts(name).items()}),
    )


def contemplation_table(comparisons: list[Comparison]) -> Table:
    def cells(c: Comparison, name: str) -> Row:
        own = [other for other in c.references(name) if c.arms[other].draft == c.arms[name].draft]
        mine, reference = c.round_parts(name), c.round_parts(own[0]) if own else {}
        row = {}
        if mine and reference and c.arms[name].contemplation != 0:
            row = {"a round": mine["round"] - reference["round"]}
            row["a token"] = mine["round"] / c.tau()[name][0] - reference["round"] / c.tau()[own[0]][0]
            row |= {part: mine[part] - reference[part] for part in ("target", "draft")}
        for cost in c.file.costs:
            if cost["arm"] == vars(c.arms[name]) and cost["dtype"] == c.setting.dtype:
                row |= {title: cost["per_round"][part] for part, title in MIXTURES.items()}
        return {part: 1000 * seconds for part, seconds in row.items()}

    return Table(
        "What contemplation adds, milliseconds",
        "A round, a token and the parts of a round against EAGLE-3 mode of the same draft and tree, in the answers: "
        "contemplate rows and soft prompts are in the target's part. Of these parts the mixtures of experts and the "
        "projections of f, timed inside a call of their own.",
        _rows(comparisons, cells),
    )


def memory_table(comparisons: list[Comparison]) -> Table:
    def cells(c: Comparison, name: str) -> Row:
        answers = c.of(name)
        rounds, row = answers["rounds"].sum(), {}
        if name in c.drafted and rounds:
            row = {"nodes": answers["tree_nodes"].sum() / rounds}
            row["contemplate rows"] = answers["contemplate_rows"].sum() / rounds
            for cache in CACHES:
                row[cache.removesuffix("_cache_bytes") + " KV"] = answers[cache].max() / 2**20
        return row | {"peak": answers["peak"].max() / 2**20}

    return Table(
        "Rows per forward, and memory in MiB",
        "Nodes (the root is one) and contemplate rows: means over the rounds. Keys and values of the longest text: "
        "the target's, the draft's, and what a round adds to the target's until it is compacted (tree nodes, "
        "contemplate rows, soft prompts). Peak, where it was measured: most memory in use during a call, all weights "
        "included; on a CPU, of the whole process.",
        _rows(comparisons, cells, drafts_only=False),
        folded=True,
    )


def curve_table(curves: list[Row]) -> Table:
    context = " or ".join({str(cost["context"]) for cost in curves})
    return Table(
        "The target's forward over the rows of a tree, milliseconds",
        f"Behind a context of {context} tokens; explicit tree mask, logits of every row.",
        [{"": cost["dtype"]} | {str(rows): 1000 * taken for rows, taken in cost["points"]} for cost in curves],
        digits=1,
    )


def exactness_table(comparisons: list[Comparison]) -> Table:
    def cells(c: Comparison, name: str) -> Row:
        if name == c.plain:
            return {}
        answers = c.of(name)
        apart = answers[answers["departs"]]
        row: Row = {"answers": len(answers), "identical": len(answers) - len(apart)}
        row["position"] = int(apart["position"].median()) if len(apart) else None
        row |= {"gap, median": apart["gap"].median(), "gap, largest": apart["gap"].max()}
        if c.setting.dtype in FULL_PRECISION and c.setting.temperature == 0:
            # A text that ends where the other goes on has no gap, and no tie explains it.
            row[f"above {TIE:g}"] = int((apart["gap"].isna() | (apart["gap"] > TIE)).sum())
        return row

    return Table(
        "Where texts part from plain generate's",
        "An answer departs where its first token differs. Position: of that token in its turn, median. Gap: how far "
        "apart the target's logits of the two tokens are there, in one forward over the common text; not measured "
        f"when sampling. In fp32 rounding explains a gap of up to {TIE:g}, a tie; a larger one would be an error, and "
        "so would a text that ends where the other goes on, which counts among them. In half precision kernels round "
        f"differently with the number of rows, so that two nearly equal scores may swap and a text part there. "
        f"{SAMPLED}",
        _rows(comparisons, cells, drafts_only=False),
        digits=4,
    )
