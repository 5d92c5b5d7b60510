"""
Figures as pictures: light panels, readable in print and on dark pages alike, in Okabe and Ito's palette, whose colours
colour-blind eyes tell apart.
"""

import io
from collections.abc import Callable
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from cycler import cycler

from .arms import TREE_KNOBS
from .figures import Comparison


matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402 - after the choice of a backend that draws to files


COLOURS = ["#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#666666", "#000000"]
PANEL, INK = "#fcfcfa", "#222222"
STYLE = {
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), PANEL),
    "text.color": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#d8d8d2",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=COLOURS)
    + cycler(marker=["s", "o", "^", "D", "v", "P", "X", "*"])
    + cycler(linestyle=["--", "-", "-.", ":"] * 2),
    "legend.frameon": False,
    "figure.dpi": 140,
    "figure.constrained_layout.use": True,
}


class Plot(NamedTuple):
    """A picture (PNG) with the name of its file, its title, and what it shows and how to read it."""

    name: str
    title: str
    caption: str
    png: bytes


def draw(drawing: Callable[..., tuple[Any, str, str] | None], *data: Any, name: str | None = None) -> Plot | None:
    """Run one of the functions below; `None` if the data do not have what it shows."""
    with pyplot.rc_context(STYLE):
        drawn = drawing(*data)
        if drawn is None:
            return None
        figure, title, caption = drawn
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.15)
        pyplot.close(figure)
    return Plot(name or drawing.__name__, title, caption, buffer.getvalue())


def main_tree(c: Comparison) -> list[str]:
    """The drafts' arms with the tree that comes first: few enough for one picture."""
    trees = {name: [getattr(c.arms[name], knob) for knob in TREE_KNOBS] for name in c.drafted}
    return [name for name, tree in trees.items() if tree == next(iter(trees.values()))]


def speedup_by_group(c: Comparison) -> tuple[Any, str, str] | None:
    arms = main_tree(c) + [name for name, arm in c.arms.items() if arm.kind in ("prompt_lookup", "assistant")]
    if not arms:
        return None
    groups: list[str | None] = [*c.groups, None]
    intervals = [[c.interval(c.speedup_total(group)[arm], group)[:3] for group in groups] for arm in arms]
    value, low, high = np.moveaxis(np.array(intervals), -1, 0)  # each (arms, groups)
    frame = pd.DataFrame(value.T, [(group or "all").replace("_", "\n") for group in groups], arms)
    whiskers = np.nan_to_num(np.stack([value - low, high - value], axis=1))
    figure, axes = pyplot.subplots(figsize=(9, 3.8))
    frame.plot.bar(ax=axes, yerr=whiskers, width=0.84, rot=0, edgecolor=INK, linewidth=0.5, legend=False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    axes.axhline(1, color=INK, linewidth=1)
    axes.set(ylabel="speed-up over plain generate")
    caption = "Total tokens over total time, against plain generate (the line at 1). Whiskers: 95 % intervals."
    return figure, "Speed-up by group of questions", caption


def survival(c: Comparison) -> tuple[Any, str, str] | None:
    arms = main_tree(c)
    if not arms:
        return None
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6))
    results = {name: c.acceptance(name) for name in arms}
    depth = max(len(result["survival"]) for result in results.values())
    for name, result in results.items():
        left.plot(range(depth + 1), [1, *result["survival"], *[0.0] * (depth - len(result["survival"]))], label=name)
        right.plot(range(1, len(result["conditional"]) + 1), result["conditional"])
    left.set(xlabel="accepted drafted tokens l", ylabel="P(accepted ≥ l)", ylim=(0, 1.03), xticks=range(depth + 1))
    right.set(xlabel="draft step l", ylabel="P(accepted ≥ l | accepted ≥ l − 1)", ylim=(0, 1.03))
    right.set(xlim=(0.8, depth + 0.2), xticks=range(1, depth + 1))
    figure.legend(loc="outside upper center", ncols=3)
    caption = (
        "Left: share of the rounds that accepted at least l drafted tokens, up to the tree's depth. Right: how often "
        "a step is accepted where the step before it was."
    )
    return figure, "Survival of drafted tokens", caption


def round_costs(c: Comparison) -> tuple[Any, str, str] | None:
    parts = {name: values for name in c.drafted if (values := c.round_parts(name))}
    if not parts:
        return None
    frame = 1000 * pd.DataFrame(parts).T
    figure, axes = pyplot.subplots(figsize=(9, 1.4 + 0.42 * len(frame)))
    bars = frame.drop(columns=["round", "prefill"])
    bars.plot.barh(stacked=True, ax=axes, width=0.7, edgecolor=INK, linewidth=0.5, legend=False)
    for place, (name, total) in enumerate(frame["round"].items()):
        axes.annotate(f" {total:.1f} ms, tau {c.tau()[name][0]:.2f}", (total, place), va="center")
    axes.invert_yaxis()
    axes.set(xlabel="milliseconds per round", xlim=(0, frame["round"].max() * 1.3))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=5)
    return figure, "Where a round's time goes", "Means over all rounds. Rest: what `generate` does besides."


def sweep(c: Comparison, knob: str) -> tuple[Any, str, str] | None:
    """Tau and speed against one knob, a line for each combination of the others with several values of it."""
    lines: dict[tuple[str, ...], list[str]] = {}
    copies = any(c.arms[name].lookup for name in c.drafted if c.arms[name].tree_size is not None)
    for name in c.drafted:
        arm = c.arms[name]
        if arm.tree_size is not None:  # else rounds are automatic
            others = [f"{other} {getattr(arm, other)}" for other in TREE_KNOBS if other != knob]
            mode = [] if knob == "contemplation" else [arm.mode]
            others += ["with lookup" if arm.lookup else "without lookup"] if copies else []
            lines.setdefault((arm.draft, *mode, *others), []).append(name)
    lines = {key: names for key, names in lines.items() if len(names) > (2 if knob == "contemplation" else 1)}
    if not lines:
        return None
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6))
    shared = set.intersection(*map(set, lines)) if len(lines) > 1 else set()
    titles = "tau", "speed-up over plain generate"
    for axes, title, samples in zip(panels, titles, (c.tau(), c.speedup_total()), strict=True):
        for key, names in lines.items():
            names = sorted(names, key=lambda name: getattr(c.arms[name], knob))
            places = [getattr(c.arms[name], knob) for name in names]
            value, low, high = np.array([c.interval(samples[name])[:3] for name in names]).T
            (line,) = axes.plot(places, value, label=", ".join(part for part in key if part not in shared))
            axes.fill_between(places, low, high, color=line.get_color(), alpha=0.13)
        axes.set(xlabel=f"confu_{knob}", ylabel=title)
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[1].axhline(1, color=INK, linewidth=1)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    caption = "Shaded: 95 % intervals over questions. The line at 1 is plain generate."
    return figure, f"Accepted length and speed against {knob.replace('_', ' ')}", caption


def forward_curve(curves: list[dict[str, Any]]) -> tuple[Any, str, str] | None:
    if not curves:
        return None
    figure, axes = pyplot.subplots(figsize=(7, 3.8))
    for cost in curves:
        rows, seconds = np.array(cost["points"]).T
        axes.plot(rows, 1000 * seconds, label=cost["dtype"])
    axes.set(xlabel="rows in the forward", ylabel="milliseconds", ylim=(0, None), xlim=(0, None))
    axes.legend(loc="upper left")
    caption = (
        f"Over a tree of so many rows behind {curves[0]['context']} tokens. A contemplate row costs what any row "
        "costs, less its logits."
    )
    return figure, "What a forward of the target costs over its rows", caption
