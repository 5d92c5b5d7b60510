"""Figures as tables, in Markdown and CSV."""

import csv
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .aggregation import ArmAnswers, Comparison, Interval, Spread


MAX_EMITTED = 8
TIE = 1e-4  # largest gap that fp32 rounding explains


@dataclass
class Table:
    r"""
    Args:
        name (`str`): Of its file.
        title (`str`): Heading.
        note (`str`): What the figures are and how they were counted.
        columns (`list[str]`): Headings.
        rows (`list[list]`): Cells: text, numbers, [`Interval`] or [`Spread`].
        digits (`int`): Decimals of numbers that are no counts.
        texts (`int`): Columns from the left that are set to the left.
    """

    name: str
    title: str
    note: str
    columns: list[str]
    rows: list[list[Any]]
    digits: int = 2
    texts: int = 1

    def cells(self) -> list[list[str]]:
        return [[self._text(cell) for cell in row] for row in self.rows]

    def _text(self, cell: Any) -> str:
        def number(value: float) -> str:
            return "" if np.isnan(value) else f"{value:.{self.digits}f}"

        if cell is None:
            return ""
        if isinstance(cell, Interval):
            bounds = "" if np.isnan(cell.low) else f" ({number(cell.low)} to {number(cell.high)})"
            return number(cell.value) + bounds
        if isinstance(cell, Spread):
            return number(cell.median) + (
                "" if cell.low == cell.high else f" [{number(cell.low)}, {number(cell.high)}]"
            )
        return number(cell) if isinstance(cell, float) else f"{cell:,}" if isinstance(cell, int) else str(cell)

    def markdown(self) -> str:
        rule = ["---"] * self.texts + ["---:"] * (len(self.columns) - self.texts)
        lines = [self.columns, rule, *self.cells()]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def csv(self) -> str:
        """Full precision; an interval or a spread takes three columns."""
        bounds = []
        for index in range(len(self.columns)):
            kinds = {type(row[index]) for row in self.rows}
            of_runs = ["lowest run", "highest run"] if Spread in kinds else []
            bounds.append(["95 % low", "95 % high"] if Interval in kinds else of_runs)
        wide = [bool(names) for names in bounds]
        header = [
            name
            for column, names in zip(self.columns, bounds, strict=True)
            for name in (column, *(f"{column}, {bound}" for bound in names))
        ]
        lines = [header]
        for row in self.rows:
            line: list[Any] = []
            for cell, is_wide in zip(row, wide, strict=True):
                if isinstance(cell, Interval | Spread):
                    line += [cell.value if isinstance(cell, Interval) else cell.median, cell.low, cell.high]
                else:
                    line += [cell, "", ""] if is_wide else [cell]
            lines.append(line)
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows(lines)
        return buffer.getvalue()


INTERVALS = "In round brackets the 95 % interval of a paired bootstrap over questions, stratified by group"
SAMPLED = (
    "When sampling, prompt lookup and assistant models draw along their own way: their texts follow the same law and "
    "are others."
)


def speed_table(comparison: Comparison) -> Table:
    rows = []
    for arm in comparison.arms.values():
        rows.append(
            [
                arm.arm.label,
                comparison.tau(arm) if arm.has_rounds else 1.0,
                comparison.by_run(arm, "tokens_per_second"),
                comparison.speedup_total(arm),
                comparison.by_run(arm, "speedup_total"),
                comparison.speedup_mean(arm),
                f"{_identical(arm)}/{len(arm.all)}",
            ]
        )
    return Table(
        "speed",
        "Speed and accepted length",
        f"tau: tokens emitted in rounds / rounds. Speed-up: against plain generate, total tokens over total time, and "
        f"as the mean of the questions' ratios, all runs together. {INTERVALS}; in square brackets the lowest and "
        f"highest run around the median of {len(comparison.runs)}. Identical: texts equal to plain generate's."
        + _if_sampled([comparison]),
        ["arm", "tau", "tokens/s", "speed-up, total", "total by run", "speed-up, mean", "identical"],
        rows,
    )


def _if_sampled(comparisons: Iterable[Comparison]) -> str:
    return f" {SAMPLED}" if any(comparison.setting.temperature > 0 for comparison in comparisons) else ""


def overview_table(comparisons: Iterable[Comparison]) -> Table:
    """Every arm of several comparisons once, by temperature and tree size: what changes with which factor."""
    comparisons = list(comparisons)
    rows = []
    seen: set[tuple[Any, ...]] = set()
    for comparison in comparisons:
        for arm in comparison.arms.values():
            if (comparison.setting, arm.arm) in seen:
                continue
            seen.add((comparison.setting, arm.arm))
            own = []
            if arm.arm.contemplation:
                own = [other for other in comparison.references(arm) if other.arm.draft == arm.arm.draft]
            by_run = comparison.by_run(arm, "speedup_total")
            rows.append(
                [
                    f"{comparison.setting.temperature:g}",
                    arm.arm.tree_size or None,
                    arm.arm.name,
                    comparison.tau(arm) if arm.has_rounds else 1.0,
                    comparison.tau_difference(arm, own[0]) if own else None,
                    comparison.by_run(arm, "tokens_per_second").median,
                    1.0 if arm is comparison.plain else comparison.speedup_total(arm),
                    f"{by_run.low:.2f} to {by_run.high:.2f}" if by_run.low < by_run.high else None,
                    1.0 if arm is comparison.plain else comparison.speedup_mean(arm),
                    f"{_identical(arm)}/{len(arm.all)}",
                ]
            )
    several = len({(row[0], row[1]) for row in rows if row[1] is not None}) > 1
    return Table(
        "overview",
        "One factor at a time" if several else "Accepted length and speed",
        "T: temperature. N: nodes of the tree. C: contemplate rows. tau: tokens emitted in rounds / rounds; beside it "
        "its difference from EAGLE-3 mode of the same draft and tree. Speed-up: against plain generate in the same "
        "measurement, total tokens over total time of all runs; its lowest and highest run, where there were several; "
        "the mean of the questions' ratios. tokens/s: median of the runs. "
        f"{INTERVALS}. Equal: texts that are plain generate's.{_if_sampled(comparisons)}",
        ["T", "N", "arm", "tau", "against EAGLE-3 mode", "tokens/s", "speed-up", "by run", "mean of ratios", "equal"],
        rows,
        texts=3,
    )


def exactness_sentence(comparison: Comparison) -> str:
    """Whether the texts of all drafts are plain generate's, and if not, by how much they part."""
    answers = [answer for arm in comparison.drafted() for answer in arm.all]
    departures = [answer.departure for answer in answers if answer.departure is not None]
    sentence = (
        f"{comparison.setting}: {len(answers) - len(departures)} of {len(answers)} answers "
        f"({len(comparison.questions)} questions, {len(comparison.drafted())} arms with a draft) are plain "
        "generate's, token for token"
    )
    gaps = [departure.gap for departure in departures if departure.gap is not None]
    if gaps:
        sentence += f"; at the first other token the target's logits of the two lie at most {max(gaps):.2g} apart"
    if comparison.setting.temperature == 0 and len(gaps) < len(departures):
        sentence += f"; {len(departures) - len(gaps)} end elsewhere"
    return sentence + "."


def group_table(comparison: Comparison, name: str, title: str, figure: Callable[..., Interval]) -> Table:
    """A figure of each arm (`comparison.tau` and the like) by group and over all."""
    arms = [arm for arm in comparison.arms.values() if arm.has_rounds]
    groups = list(comparison.groups.items())
    return Table(
        name,
        title,
        f"{INTERVALS}. Questions: {', '.join(f'{group} {len(members)}' for group, members in groups)}.",
        ["arm", *(group for group, _ in groups), "all"],
        [[arm.arm.label, *(figure(arm, members) for _, members in groups), figure(arm)] for arm in arms],
    )


def group_depth_table(comparison: Comparison) -> Table | None:
    """Survival by group, with the main tree size."""
    results = [
        (arm.arm.label, group, arm.acceptance(members)["survival"])
        for arm in comparison.of_main_size()
        for group, members in comparison.groups.items()
    ]
    if not results:
        return None
    depth = max(len(survival) for _, _, survival in results)
    return Table(
        "survival_by_group",
        "P(accepted >= l) by group",
        "Over all rounds of the group's questions.",
        ["arm", "group", *(f"l = {level}" for level in range(1, depth + 1))],
        [[label, group, *survival, *[0.0] * (depth - len(survival))] for label, group, survival in results],
        digits=3,
        texts=2,
    )


def depth_table(comparison: Comparison) -> Table | None:
    arms = comparison.drafted()
    if not arms:
        return None
    results = [(arm, arm.acceptance()) for arm in arms]
    depth = max(len(result["survival"]) for _, result in results)
    rows = []
    for arm, result in results:
        missing = depth - len(result["survival"])
        rows.append([arm.arm.label, "P(accepted >= l)", *result["survival"], *[0.0] * missing])
        rows.append([arm.arm.label, "given l - 1", *result["conditional"], *[None] * missing])
        rows.append([arm.arm.label, f"of {result['rounds']:,} rounds", *result["accepted_by_depth"], *[0] * missing])
    return Table(
        "acceptance_by_depth",
        "Acceptance by draft step",
        "Over all rounds, the last of a text included, which its end may cut short. The second line of an arm is the "
        "share of the rounds that accepted l - 1 tokens which also accepted the next, the third the number of rounds "
        "that accepted l.",
        ["arm", "", *(f"l = {level}" for level in range(1, depth + 1))],
        rows,
        digits=3,
        texts=2,
    )


def difference_table(comparison: Comparison) -> Table | None:
    rows = []
    for arm in comparison.drafted():
        for other in comparison.references(arm):
            rows.append(
                [
                    arm.arm.label,
                    other.arm.label,
                    comparison.tau_difference(arm, other),
                    comparison.speedup_total(arm, over=other),
                    comparison.speedup_difference(arm, other),
                ]
            )
    if not rows:
        return None
    return Table(
        "differences",
        "Against EAGLE-3 mode",
        f"{INTERVALS}: where it leaves out 0 (or, for the quotient, 1), the two arms differ beyond what other "
        "questions of the same kind would change.",
        ["arm", "against", "tau, difference", "speed, quotient", "speed-up, difference"],
        rows,
        digits=3,
        texts=2,
    )


def group_difference_table(comparison: Comparison) -> Table | None:
    """Difference in tau by group, with the main tree size: whether a group is worse off."""
    rows = [
        [
            arm.arm.label,
            other.arm.label,
            *(comparison.tau_difference(arm, other, members) for members in comparison.groups.values()),
            comparison.tau_difference(arm, other),
        ]
        for arm in comparison.of_main_size()
        for other in comparison.references(arm)
    ]
    if not rows:
        return None
    return Table(
        "tau_difference_by_group",
        "Accepted length against EAGLE-3 mode, by group",
        f"Difference in tau. {INTERVALS}: where it lies below 0 as a whole, the group is worse off.",
        ["arm", "against", *comparison.groups, "all"],
        rows,
        texts=2,
    )


def time_table(comparison: Comparison) -> Table | None:
    rows = []
    for arm in comparison.drafted():
        parts = arm.parts()
        if parts:
            in_round = [1000 * parts[name] for name in ("draft", "target", "walk", "compaction", "rest")]
            rows.append([arm.arm.label, *in_round, sum(in_round), 1000 * parts["prefill"]])
    if not rows:
        return None
    return Table(
        "time",
        "Where the time goes, milliseconds per round",
        "Rest: what `generate` does besides, its preparation of the call included. Prefill is per call. Read by the "
        "host's clock: on a GPU, work queued in one part may be waited for in a later one.",
        ["arm", "draft", "target forward", "walk", "compaction", "rest", "round", "prefill"],
        rows,
    )


def rows_table(comparison: Comparison) -> Table | None:
    """Rows per forward, bytes of caches, peak memory."""
    rows = []
    for arm in comparison.arms.values():
        turns = [turn for answer in arm.all for turn in answer.turns]
        peak = max(turn.peak_memory_bytes for turn in turns) / 2**20
        if not arm.has_accepted:
            rows.append([arm.arm.label, None, None, None, None, None, peak])
            continue
        rounds = sum(len(turn.rounds.emitted) for turn in turns)
        if not rounds:
            continue
        mebibytes = [
            max(getattr(turn.rounds, name) for turn in turns) / 2**20
            for name in ("target_cache_bytes", "draft_cache_bytes", "transient_cache_bytes")
        ]
        rows.append(
            [
                arm.arm.label,
                sum(turn.rounds.tree_nodes for turn in turns) / rounds,
                sum(turn.rounds.contemplate_rows for turn in turns) / rounds,
                *mebibytes,
                peak,
            ]
        )
    if not rows:
        return None
    return Table(
        "memory",
        "Rows per forward, and memory in MiB",
        "Nodes (the root is one) and contemplate rows: means over the rounds. Keys and values of the longest text: "
        "the target's, the draft's, and what a round adds to the target's until it is compacted (tree nodes, "
        "contemplate rows, soft prompts). Peak: most memory in use during a call, all weights included; on a "
        "CPU, of the process, which keeps what earlier calls freed.",
        ["arm", "nodes", "contemplate rows", "target KV", "draft KV", "transient KV", "peak"],
        rows,
    )


def _identical(arm: ArmAnswers) -> int:
    return sum(answer.departure is None for answer in arm.all)


def exactness_table(comparison: Comparison) -> Table:
    rows = []
    for arm in comparison.arms.values():
        if arm is comparison.plain:
            continue
        departures = [answer.departure for answer in arm.all if answer.departure is not None]
        gaps = [departure.gap for departure in departures if departure.gap is not None]
        beyond = None
        if comparison.setting.dtype in ("float32", "float64") and comparison.setting.temperature == 0:
            # A text that ends where the other goes on has no gap, and no tie explains it.
            beyond = sum(departure.gap is None or departure.gap > TIE for departure in departures)
        rows.append(
            [
                arm.arm.label,
                len(arm.all),
                _identical(arm),
                int(np.median([departure.position for departure in departures])) if departures else None,
                float(np.median(gaps)) if gaps else None,
                max(gaps) if gaps else None,
                beyond,
            ]
        )
    sampled = "; not measured when sampling" if comparison.setting.temperature > 0 else ""
    return Table(
        "exactness",
        "Texts against plain generate's",
        "An answer departs where its first token differs. Position: of that token in its turn, median. Gap: how far "
        "apart the target's logits of the two tokens are there, in one forward over the common "
        f"text{sampled}. In fp32 rounding explains a gap of up to 1e-4; a larger one would be an error, and so "
        "would a text that ends where the other goes on, which counts among them." + _if_sampled([comparison]),
        ["arm", "answers", "identical", "position", "gap, median", "gap, largest", "above 1e-4"],
        rows,
        digits=4,
    )


PARTS_OF_CONTEMPLATION = {
    "contemplate rows": ["rows"],
    "soft-prompt slots": ["slots"],
    "experts of [con]": ["contemplate_experts"],
    "experts of [f]": ["future_experts"],
    "projections of f": ["projections"],
    "sum": ["rows", "slots", "contemplate_experts", "future_experts", "projections"],
}


def extra_cost_table(comparison: Comparison, costs: list[dict[str, Any]]) -> Table | None:
    """What each part of contemplation adds to a round, and to each token of a round that emits 1 to `MAX_EMITTED`."""
    drafted = {arm.arm.label: arm for arm in comparison.drafted() if arm.parts()}
    rows: list[list[Any]] = []
    for cost in costs:
        if cost["dtype"] != comparison.setting.dtype or cost["label"] not in drafted:
            continue
        arm = drafted[cost["label"]]
        per_round = {
            part: 1000 * sum(cost["per_round"][name] for name in names)
            for part, names in PARTS_OF_CONTEMPLATION.items()
        }
        for other in comparison.references(arm):
            if other.arm.draft == arm.arm.draft and other.parts():
                per_round["in the answers"] = 1000 * (arm.round_seconds() - other.round_seconds())
        for part, milliseconds in per_round.items():
            per_token = [milliseconds / emitted for emitted in range(1, MAX_EMITTED + 1)]
            rows.append([arm.arm.label, part, milliseconds, *per_token])
    if not rows:
        return None
    return Table(
        "extra_cost",
        "What contemplation adds, milliseconds",
        "Per round, and divided by its tokens where it emits 1, 2, ... (at most the tree's depth + 1). Rows and "
        f"slots: forwards of the target over a context of {costs[0]['context']} tokens, medians, whose differences "
        "carry the machine's noise. Experts and projections: inside a real call. In the answers: how much longer the "
        "rounds above were than in EAGLE-3 mode of the same draft.",
        ["arm", "", "a round", *(f"/{emitted}" for emitted in range(1, MAX_EMITTED + 1))],
        rows,
        texts=2,
    )


def curve_table(costs: list[dict[str, Any]]) -> Table | None:
    curves = [cost for cost in costs if "points" in cost]
    if not curves:
        return None
    return Table(
        "forward_curve",
        "The target's forward over the rows of a tree, milliseconds",
        f"Median; context of {curves[0]['context']} tokens, explicit tree mask, logits of every row.",
        ["dtype", *(f"{rows}" for rows, _ in curves[0]["points"])],
        [[cost["dtype"], *(1000 * seconds for _, seconds in cost["points"])] for cost in curves],
        digits=1,
    )


def parameter_table(costs: list[dict[str, Any]]) -> Table | None:
    rows: list[list[Any]] = []
    seen = set()
    for cost in costs:
        if "parameters" in cost and cost["draft"] not in seen:
            seen.add(cost["draft"])
            parts = cost["parameters"]
            rows.append([cost["draft"], *parts.values(), sum(parts.values()), cost["slot_bytes"] / 2**20])
            names = list(parts)
    if not rows:
        return None
    return Table(
        "parameters",
        "Parameters of the drafts",
        "Embeddings that a draft reads from the target are not counted. Slots: the soft prompts' bytes, in MiB.",
        ["draft", *names, "all", "slots"],
        rows,
    )


def tables_of(comparison: Comparison, costs: list[dict[str, Any]]) -> list[Table]:
    """All tables of one setting."""
    tables = [
        speed_table(comparison),
        difference_table(comparison),
        group_difference_table(comparison),
        group_table(comparison, "tau_by_group", "Accepted length (tau) by group", comparison.tau),
        group_table(comparison, "speedup_by_group", "Speed-up by group, total", comparison.speedup_total),
        group_table(comparison, "mean_speedup_by_group", "Speed-up by group, mean", comparison.speedup_mean),
        group_table(comparison, "rate_by_group", "Tokens per second by group", comparison.tokens_per_second),
        depth_table(comparison),
        group_depth_table(comparison),
        time_table(comparison),
        extra_cost_table(comparison, costs),
        rows_table(comparison),
        exactness_table(comparison),
    ]
    return [table for table in tables if table is not None]
