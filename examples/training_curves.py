"""
What finished or interrupted training runs reached by which time:

    python examples/training_curves.py runs/core runs/joint

Reads the log of the newest checkpoint of each folder; evaluation and saving count as time, interruptions do not. A row
is an evaluation, or, of a run without any, a line of the training log. Losses are not comparable across losses and
numbers of TTT steps, `tau_greedy` is across runs that were evaluated on the same rows.
"""

import argparse
import json
from pathlib import Path


COLUMNS = ("loss", "tau_greedy", "eval_loss", "eval_tau_greedy")


def read_log(folder: Path) -> list[dict[str, float]]:
    states = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name[11:]))
    if not states:
        raise ValueError(f"{folder} holds no checkpoint; name the `output_dir` of a run.")
    return json.loads(states[-1].read_text())["log_history"]


def curve(log: list[dict[str, float]]) -> list[dict[str, float]]:
    """Step, hours, tokens read, and what was last logged by then."""
    seconds = before = 0.0  # of this session and those before
    newest: dict[str, float] = {}
    trained, evaluated = [], []
    for entry in log:
        if "loss" in entry:
            if "train_runtime" not in entry:
                raise ValueError("This log has no times: it was written with `include_num_input_tokens_seen=no`.")
            if entry["train_runtime"] < seconds:  # resumed: the clock starts anew
                before += seconds
            seconds = entry["train_runtime"]
        newest |= {name: entry[name] for name in COLUMNS if name in entry}
        row = {"step": entry["step"], "hours": (before + seconds) / 3600, "tokens": entry["num_input_tokens_seen"]}
        if "eval_loss" in entry:
            evaluated.append(row | newest)
        elif "loss" in entry:
            trained.append(row | newest)
    return evaluated or trained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of `confu train`")
    for folder in parser.parse_args().runs:
        rows = curve(read_log(folder))
        columns = [name for name in COLUMNS if name in rows[-1]]
        print(f"\n{folder}\n")
        print("| step | hours | million tokens | " + " | ".join(columns) + " |")
        print("|---|---|---|" + "---|" * len(columns))
        for row in rows:
            values = [f"{row[name]:.3f}" if name in row else "" for name in columns]
            print(f"| {row['step']} | {row['hours']:.3f} | {row['tokens'] / 1e6:.2f} | " + " | ".join(values) + " |")


if __name__ == "__main__":
    main()
