"""Figures as pictures. Every picture is its own light panel, readable in print and on dark pages alike.

Arms differ by colour (Okabe and Ito's palette, told apart with colour-blind eyes), marker, dash and hatch at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .aggregation import ArmAnswers, Comparison


COLOURS = ("#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#666666", "#000000")
MARKERS = ("s", "o", "^", "D", "v", "P", "X", "*")
DASHES = ("--", "-", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), "--", "-")
HATCHES = ("//", "", "..", "xx", "\\\\", "++", "oo", "--")
PART_COLOURS = {
    "draft": "#E69F00",
    "target forward": "#56B4E9",
    "walk": "#009E73",
    "compaction": "#CC79A7",
    "rest": "#999999",
}
PANEL, INK, GRID = "#fcfcfa", "#222222", "#d8d8d2"
STYLE = {
    "figure.facecolor": PANEL,
    "axes.facecolor": PANEL,
    "savefig.facecolor": PANEL,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 10,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
    "figure.dpi": 160,
}
MOST_BARS = 6  # arms side by side in one bar chart


@dataclass
class Plot:
    r"""
    Args:
        name (`str`): Of its file, without `.png`.
        title (`str`): Heading.
        caption (`str`): What it shows and how to read it.
        path (`Path`): The picture.
    """

    name: str
    title: str
    caption: str
    path: Path


def matplotlib_pyplot() -> Any:
    """matplotlib, which is no dependency of the rest, drawing to files only."""
    try:
        import matplotlib
    except ImportError as error:
        raise RuntimeError("Plots need matplotlib. Install it with `pip install 'matplotlib>=3.9'`.") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def plots_of(
    comparison: Comparison, folder: Path, prefix: str, drawings: Sequence[Callable[..., Any]] | None = None
) -> list[Plot]:
    """Draw the pictures (all `DRAWINGS` by default) that one setting gives, to `folder / (prefix + name.png)`."""
    return _draw(DRAWINGS if drawings is None else drawings, comparison, folder, prefix)


def _draw(drawings: Sequence[Callable[..., Any]], data: Any, folder: Path, prefix: str) -> list[Plot]:
    pyplot = matplotlib_pyplot()
    plots = []
    for drawing in drawings:
        with pyplot.rc_context(STYLE):
            drawn = drawing(pyplot, data)
            if drawn is None:
                continue
            figure, title, caption = drawn
            name = prefix + drawing.__name__
            path = folder / f"{name}.png"
            figure.savefig(path, bbox_inches="tight", pad_inches=0.15)
            pyplot.close(figure)
        plots.append(Plot(name, title, caption, path))
    return plots


def cost_plots(costs: list[dict[str, Any]], folder: Path) -> list[Plot]:
    """The picture that does not depend on a setting."""
    return _draw([forward_curve], costs, folder, "")


def style_of(index: int) -> dict[str, Any]:
    """Of the arm at a place; where colours come round again, they meet other markers and dashes."""
    turn, colour = divmod(index, len(COLOURS))
    shape = (colour + turn) % len(MARKERS)
    return {"color": COLOURS[colour], "marker": MARKERS[shape], "linestyle": DASHES[shape], "markersize": 6}


def survival(pyplot: Any, comparison: Comparison) -> tuple[Any, str, str] | None:
    arms = comparison.of_main_size()
    if not arms:
        return None
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    depth = 0
    for index, arm in enumerate(arms):
        result = arm.acceptance()
        levels = range(1, len(result["survival"]) + 1)
        depth = max(depth, len(levels))
        left.plot([0, *levels], [1, *result["survival"]], label=arm.arm.label, **style_of(index))
        right.plot(levels, result["conditional"], **style_of(index))
    left.set(xlabel="accepted drafted tokens l", ylabel="P(accepted ≥ l)", ylim=(0, 1.03))
    right.set(xlabel="draft step l", ylabel="P(accepted ≥ l | accepted ≥ l − 1)", ylim=(0, 1.03))
    left.set_xticks(range(depth + 1))
    right.set_xticks(range(1, depth + 1))
    figure.legend(loc="outside upper center", ncols=min(3, len(arms)))
    return (
        figure,
        "Survival of drafted tokens",
        "Left: share of the rounds that accepted at least l drafted tokens. Right: how often a step is accepted where "
        "the step before it was. All rounds of all runs.",
    )


def speedup_by_group(pyplot: Any, comparison: Comparison) -> tuple[Any, str, str]:
    baselines = [arm for arm in comparison.arms.values() if arm.has_rounds and not arm.has_accepted]
    candidates = [*comparison.of_main_size(), *baselines]
    arms = candidates[:MOST_BARS]
    members = [*comparison.groups.items(), ("all", None)]
    figure, axes = pyplot.subplots(figsize=(9, 3.8), layout="constrained")
    width = 0.84 / max(1, len(arms))
    for index, arm in enumerate(arms):
        for place, (_, indices) in enumerate(members):
            figure_of = comparison.speedup_total(arm, indices)
            x = place - 0.42 + width * (index + 0.5)
            axes.bar(
                x,
                figure_of.value,
                width * 0.92,
                color=COLOURS[index % len(COLOURS)],
                hatch=HATCHES[index % len(HATCHES)],
                edgecolor=INK,
                linewidth=0.5,
                label=arm.arm.label if place == 0 else None,
            )
            if figure_of.low == figure_of.low:  # no interval is NaN
                axes.vlines(x, figure_of.low, figure_of.high, color=INK, linewidth=1.1)
    axes.axhline(1, color=INK, linewidth=1)
    axes.set_xticks(range(len(members)), [name.replace("_", "\n") for name, _ in members])
    axes.set(ylabel="speed-up over plain generate")
    axes.grid(axis="x", visible=False)
    figure.legend(loc="outside upper center", ncols=min(3, max(1, len(arms))))
    return (
        figure,
        "Speed-up by group of questions",
        "Total tokens over total time, against plain generate (the line at 1). Whiskers: 95 % intervals over "
        "questions." + (f" The first {len(arms)} of {len(candidates)} arms." if len(arms) < len(candidates) else ""),
    )


def round_costs(pyplot: Any, comparison: Comparison) -> tuple[Any, str, str] | None:
    arms = [arm for arm in comparison.drafted() if arm.parts()]
    if not arms:
        return None
    figure, axes = pyplot.subplots(figsize=(9, 1.4 + 0.42 * len(arms)), layout="constrained")
    names = {"draft": "draft", "target forward": "target"} | {n: n for n in ("walk", "compaction", "rest")}
    starts = [0.0] * len(arms)
    for hatch, (name, part) in zip(("//", "", "xx", "..", "\\\\"), names.items(), strict=True):
        values = [1000 * arm.parts()[part] for arm in arms]
        axes.barh(
            range(len(arms)), values, 0.7, left=starts, label=name, color=PART_COLOURS[name], hatch=hatch,
            edgecolor=INK, linewidth=0.5,
        )  # fmt: skip
        starts = [start + value for start, value in zip(starts, values, strict=True)]
    for place, (arm, end) in enumerate(zip(arms, starts, strict=True)):
        axes.annotate(f" {end:.1f} ms, tau {comparison.tau(arm).value:.2f}", (end, place), va="center")
    axes.set_yticks(range(len(arms)), [arm.arm.label for arm in arms])
    axes.invert_yaxis()
    axes.set(xlabel="milliseconds per round", xlim=(0, max(starts) * 1.3))
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside upper center", ncols=5)
    return (
        figure,
        "Where a round's time goes",
        "Means over all rounds. Rest: what `generate` does besides, its preparation of the call included.",
    )


def sizes(pyplot: Any, comparison: Comparison) -> tuple[Any, str, str] | None:
    """Tau and speed against the tree's size, one line for each budget of each draft."""
    lines: dict[str, list[ArmAnswers]] = {}
    for arm in comparison.drafted():
        named = f"{arm.arm.draft}: " if arm.arm.num_drafts > 1 else ""
        lines.setdefault(named + arm.arm.mode, []).append(arm)
    return _sweep(
        pyplot,
        comparison,
        {name: arms for name, arms in lines.items() if len({arm.arm.tree_size for arm in arms}) > 1},
        lambda arm: arm.arm.tree_size,
        "tree size N (nodes, root included)",
        "Accepted length and speed against the size of the tree",
    )


def budgets(pyplot: Any, comparison: Comparison) -> tuple[Any, str, str] | None:
    """Tau and speed against contemplate rows, one line for each tree size of each draft."""
    lines: dict[str, list[ArmAnswers]] = {}
    for arm in comparison.drafted():
        named = f"{arm.arm.draft}: " if arm.arm.num_drafts > 1 else ""
        lines.setdefault(f"{named}N = {arm.arm.tree_size}", []).append(arm)
    return _sweep(
        pyplot,
        comparison,
        {name: arms for name, arms in lines.items() if len(arms) > 2},
        lambda arm: arm.arm.contemplation,
        "contemplate rows C (0 is EAGLE-3 mode)",
        "Accepted length and speed against contemplate rows",
    )


def _sweep(
    pyplot: Any,
    comparison: Comparison,
    lines: dict[str, list[ArmAnswers]],
    place_of: Callable[[ArmAnswers], int],
    label: str,
    title: str,
) -> tuple[Any, str, str] | None:
    if not lines:
        return None
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    figures = ((left, comparison.tau, "tau"), (right, comparison.speedup_total, "speed-up over plain generate"))
    for index, (name, arms) in enumerate(lines.items()):
        arms = sorted(arms, key=place_of)
        places = [place_of(arm) for arm in arms]
        for axes, figure_of, _ in figures:
            values = [figure_of(arm) for arm in arms]
            axes.plot(
                places, [v.value for v in values], label=name if axes is left else None, **style_of(index)
            )  # fmt: skip
            axes.fill_between(
                places, [v.low for v in values], [v.high for v in values], color=COLOURS[index % 8], alpha=0.13
            )
    for axes, _, name in figures:
        axes.set(xlabel=label, ylabel=name)
        axes.set_xticks(sorted({place_of(arm) for arms in lines.values() for arm in arms}))
    right.axhline(1, color=INK, linewidth=1)
    figure.legend(loc="outside upper center", ncols=min(4, len(lines)))
    return figure, title, "Shaded: 95 % intervals over questions. The line at 1 is plain generate."


def forward_curve(pyplot: Any, costs: list[dict[str, Any]]) -> tuple[Any, str, str] | None:
    curves = [cost for cost in costs if "points" in cost]
    if not curves:
        return None
    figure, axes = pyplot.subplots(figsize=(7, 3.8), layout="constrained")
    for index, cost in enumerate(curves, start=1):
        rows, seconds = zip(*cost["points"], strict=True)
        axes.plot(rows, [1000 * value for value in seconds], label=cost["dtype"], **style_of(index))
    axes.set(xlabel="rows in the forward", ylabel="milliseconds", ylim=(0, None), xlim=(0, None))
    axes.legend(loc="upper left")
    return (
        figure,
        "What a forward of the target costs over its rows",
        f"Median over a tree of so many rows behind {curves[0]['context']} tokens. A contemplate row costs what any "
        "row costs, less its logits.",
    )


DRAWINGS = (survival, speedup_by_group, round_costs, sizes, budgets)
