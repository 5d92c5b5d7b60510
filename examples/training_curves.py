"""
What finished or interrupted training runs reached by which time, as a table and, if wanted, as a picture:

    python examples/training_curves.py runs/core runs/joint --plot curves.png

Reads the log of the newest checkpoint of each folder; evaluation and saving count as time, interruptions do not. A row
is an evaluation, or, of a run without any, a line of the training log. Losses are not comparable across losses and
numbers of TTT steps, `tau_greedy` is across runs that were evaluated on the same rows. Logs written with
`include_num_input_tokens_seen=no` have neither times nor tokens.
"""

import argparse
import json
from collections.abc import Iterable
from itertools import count
from pathlib import Path


COLUMNS = ("loss", "tau_greedy", "eval_loss", "eval_tau_greedy")
DIGITS = {"step": 0, "million tokens": 2}


def read_log(folder: Path) -> list[dict[str, float]]:
    states = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name[11:]))
    if not states:
        raise ValueError(f"{folder} holds no checkpoint; name the `output_dir` of a run.")
    return json.loads(states[-1].read_text())["log_history"]


def short_names(folders: Iterable[Path]) -> dict[Path, str]:
    """The shortest end of each path in which no other one ends: `core` and `plain/core`, say."""
    folders = set(folders)

    def is_unique(folder: Path, length: int) -> bool:
        return all(other.parts[-length:] != folder.parts[-length:] for other in folders - {folder})

    lengths = {folder: next(length for length in count(1) if is_unique(folder, length)) for folder in folders}
    return {folder: str(Path(*folder.parts[-length:])) for folder, length in lengths.items()}


def curve(log: list[dict[str, float]]) -> list[dict[str, float]]:
    """Step, hours, tokens read, and what was last logged by then."""
    seconds = before = 0.0  # of this session and those before
    session_start = tokens = 0.0  # tokens read before this session, and by now
    newest: dict[str, float] = {}
    trained, evaluated = [], []
    for entry in log:
        if "loss" in entry and "train_runtime" in entry:
            # The clock and its rate are of one session alone: they tell how many tokens had been read before it.
            start = entry["num_input_tokens_seen"] - entry["train_runtime"] * entry["train_tokens_per_second"]
            if start > (session_start + tokens) / 2:  # not the same start up to rounding: resumed, the clock is new
                before, session_start = before + seconds, start
            seconds, tokens = entry["train_runtime"], entry["num_input_tokens_seen"]
        newest |= {name: entry[name] for name in COLUMNS if name in entry}
        row = {"step": entry["step"]}
        if "num_input_tokens_seen" in entry:
            row |= {"hours": (before + seconds) / 3600, "million tokens": entry["num_input_tokens_seen"] / 1e6}
        if "eval_loss" in entry:
            evaluated.append(row | newest)
        elif "loss" in entry:
            trained.append(row | newest)
    return evaluated or trained


def plot(logs: dict[str, list[dict[str, float]]], path: Path) -> None:
    """`tau_greedy` by step: on held-out rows, and, thin, of the batches trained on."""
    # Only here, as a table needs no matplotlib.
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, log in logs.items():
        trained, held_out = (
            [(entry["step"], entry[key]) for entry in log if key in entry] for key in ("tau_greedy", "eval_tau_greedy")
        )
        line = axes.plot(*zip(*held_out, strict=True), marker="o", label=name)[0] if held_out else None
        if trained:
            axes.plot(*zip(*trained, strict=True), linewidth=0.8, alpha=0.5, color=line and line.get_color())
    axes.set(xlabel="step", ylabel="tau_greedy (marks: held out; thin: trained on)")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of `confu train`")
    parser.add_argument("--plot", type=Path, help="picture of tau_greedy by step, such as curves.png")
    arguments = parser.parse_args()
    names = short_names(arguments.runs)
    logs = {names[folder]: read_log(folder) for folder in arguments.runs}
    for name, log in logs.items():
        rows = curve(log)
        columns = [column for column in ("step", "hours", "million tokens", *COLUMNS) if column in rows[-1]]
        print(f"\n{name}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for row in rows:
            values = [f"{row[column]:.{DIGITS.get(column, 3)}f}" if column in row else "" for column in columns]
            print(f"| {' | '.join(values)} |")
    if arguments.plot is not None:
        plot(logs, arguments.plot)


if __name__ == "__main__":
    main()
