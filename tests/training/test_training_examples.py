"""The examples that measure training, on a tiny target."""

import dataclasses
import json
import math
import runpy
import sys
from pathlib import Path

import pytest
from commands import write_run
from transformers import HfArgumentParser

from transformers_confu.training import ConFuTrainingArguments
from transformers_confu.training.runs import read_runs
from transformers_confu.training.train import DraftArguments, main, recipe_of


EXAMPLES = Path(__file__).parents[2] / "examples"


def run_example(name: str, monkeypatch, capsys, *arguments: str) -> list[list[str]]:
    """The cells of the tables that an example prints, row by row."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    capsys.readouterr()
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_benchmark_runs_every_arm_over_the_same_batches(saved_target, tmp_path, monkeypatch, capsys):
    write_run(tmp_path, saved_target)
    options = {
        "target": saved_target,
        "target_dtype": "float32",
        "data": tmp_path / "data.jsonl",
        "output_dir": tmp_path / "unused",
        "draft_vocab_size": 50,
        "num_soft_prompts": 5,
        "instruction": "abc",
        "tokens_per_batch": 128,
        "ttt_steps": 2,
        "learning_rate": 0.01,
        "rows": 10,
        "rounds": 2,
    }
    header, *rows = run_example(
        "benchmark_training.py",
        monkeypatch,
        capsys,
        *(part for name, value in options.items() for part in (f"--{name}", str(value))),
        *("--use_cpu", "--bf16"),
    )
    assert [row[0] for row in rows] == ["plain", "core, live", "core, kept", "joint, kept", "joint", "warm-up"]
    assert rows[0][4] == "1.00 (1.00 to 1.00)"
    losses = {row[0]: float(row[-1]) for row in rows}
    assert losses["core, live"] == pytest.approx(losses["core, kept"], rel=1e-3)
    assert losses["joint"] == pytest.approx(losses["joint, kept"], rel=0.05), "other anchors, the same rows"
    assert losses["warm-up"] == pytest.approx(math.log(97), rel=0.5), "cross-entropy over the target's vocabulary"
    assert not (tmp_path / "unused").exists()


def test_the_curve_counts_the_time_of_all_sessions(saved_target, tmp_path, monkeypatch, capsys):
    settings = {"stage": "core", "max_steps": 6, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1}
    run = write_run(tmp_path, saved_target, eval_strategy="steps", eval_steps=2, **settings)
    main([run])
    header, *rows = run_example("training_curves.py", monkeypatch, capsys, str(tmp_path / "draft"))
    assert header == ["step", "hours", "million tokens", "loss", "tau_greedy", "eval_loss", "eval_tau_greedy"]
    assert [row[0] for row in rows] == ["2", "4", "6"]

    # As if it had been resumed behind step 4: the clock starts anew.
    path = tmp_path / "draft" / "checkpoint-6" / "trainer_state.json"
    state = json.loads(path.read_text())
    for entry in state["log_history"]:
        if "train_runtime" in entry:
            entry["train_runtime"] = 3600.0 * (entry["step"] if entry["step"] <= 4 else entry["step"] - 4)
    path.write_text(json.dumps(state))
    _, *rows = run_example("training_curves.py", monkeypatch, capsys, str(tmp_path / "draft"))
    assert [float(row[1]) for row in rows] == [2, 4, 6]


def test_coverage_is_that_of_held_out_answers_by_temperature(saved_target, tmp_path, monkeypatch, capsys):
    greedy, sampled = [1, 2, 3, 96], [1, 2, 40, 96]
    with open(tmp_path / "data.jsonl", "w") as file:
        for number in range(20):
            answers = ((0.0, greedy), (0.8, sampled if number % 10 == 0 else greedy))
            for temperature, answer in answers:
                row = {"prompt": "a", "answer_ids": answer, "temperature": temperature}
                print(json.dumps(row), file=file)
    arguments = ("--target", str(saved_target), "--data", str(tmp_path / "data.jsonl"), "--sizes", "3", "4")
    header, *rows = run_example("vocabulary_coverage.py", monkeypatch, capsys, *arguments)
    assert header == ["size", "temperature 0, 8 tokens", "temperature 0.8, 8 tokens"]
    # Of four equally frequent tokens the three with the lower ids; token 40 stands in held-out rows alone.
    assert rows == [["3", "75.00%", "50.00%"], ["4", "100.00%", "75.00%"]]


def test_the_compared_joint_runs_differ_in_the_warm_up_alone():
    parser = HfArgumentParser((DraftArguments, ConFuTrainingArguments))
    names = {option.name for kind in (DraftArguments, ConFuTrainingArguments) for option in dataclasses.fields(kind)}
    runs = read_runs([str(EXAMPLES / "train_smollm2" / "warm_up_compared.yaml")], names)
    warm_up, *joint = (parser.parse_args_into_dataclasses(run, look_for_args_file=False) for run in runs)
    assert [args.stage for _, args in (warm_up, *joint)] == ["warm_up", "joint", "joint"]
    assert joint[0][0].draft == warm_up[1].output_dir
    assert joint[1][0].draft == warm_up[0].draft == "runs/core"
    recipes = [recipe_of(*run) for run in joint]
    assert {name for name in recipes[0] if recipes[0][name] != recipes[1][name]} == {"draft"}
