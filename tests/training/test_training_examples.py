"""The examples that measure training, on a tiny target."""

import dataclasses
import json
import math
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import HfArgumentParser

from commands import write_run
from helpers import make_tiny_draft, make_tiny_target
from transformers_confu import ConFuDraftModel
from transformers_confu.common.option_files import read_option_file
from transformers_confu.training import ConFuTrainingArguments
from transformers_confu.training.train import NEW_DRAFT, DraftArguments, main, recipe_of


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

    # As if it had been resumed behind step 4: the clock starts anew, and has gone further at step 5 than at step 4 if
    # steps have become slower.
    path = tmp_path / "draft" / "checkpoint-6" / "trainer_state.json"
    state = json.loads(path.read_text())
    tokens_at = {entry["step"]: entry["num_input_tokens_seen"] for entry in state["log_history"]}
    for hours, hours_by_row in ((1, [2, 4, 6]), (6, [2, 4, 16])):
        for entry in state["log_history"]:
            if "train_runtime" in entry:
                resumed = entry["step"] > 4
                entry["train_runtime"] = 3600.0 * (hours * (entry["step"] - 4) if resumed else entry["step"])
                of_session = tokens_at[entry["step"]] - (tokens_at[4] if resumed else 0)
                entry["train_tokens_per_second"] = round(of_session / entry["train_runtime"], 3)
        path.write_text(json.dumps(state))
        _, *rows = run_example("training_curves.py", monkeypatch, capsys, str(tmp_path / "draft"))
        assert [float(row[1]) for row in rows] == hours_by_row

    # Runs in folders of one name are told apart.
    again = tmp_path / "plain" / "draft"
    shutil.copytree(tmp_path / "draft", again)
    one, *rows = run_example("training_curves.py", monkeypatch, capsys, str(tmp_path / "draft"), str(again))
    assert rows.count(one) == 1 and len(rows) == 7
    short_names = runpy.run_path(str(EXAMPLES / "training_curves.py"))["short_names"]
    folders = [Path(name) for name in ("runs/core", "runs/plain/core", "runs/a", "core")]
    assert list(map(short_names(folders).get, folders)) == ["runs/core", "plain/core", "a", "core"]

    # A log of an older version has no times.
    for entry in state["log_history"]:
        for name in ("train_runtime", "train_tokens_per_second", "num_input_tokens_seen"):
            entry.pop(name, None)
    path.write_text(json.dumps(state))
    picture = tmp_path / "pictures" / "curves.png"
    arguments = (str(tmp_path / "draft"), "--plot", str(picture))
    header, *rows = run_example("training_curves.py", monkeypatch, capsys, *arguments)
    assert header == ["step", "loss", "tau_greedy", "eval_loss", "eval_tau_greedy"]
    assert [row[0] for row in rows] == ["2", "4", "6"]
    assert picture.read_bytes().startswith(b"\x89PNG")


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


def runs_of(name: str) -> dict[str, tuple[DraftArguments, ConFuTrainingArguments]]:
    """The runs of a file of `train_smollm2`, by their folders."""
    parser = HfArgumentParser((DraftArguments, ConFuTrainingArguments))
    kinds = (DraftArguments, ConFuTrainingArguments)
    types = {option.name: option.type for kind in kinds for option in dataclasses.fields(kind)}
    lines = read_option_file([str(EXAMPLES / "train_smollm2" / name)], types)
    runs = (parser.parse_args_into_dataclasses([*line, "--use_cpu=true"], look_for_args_file=False) for line in lines)
    return {Path(training.output_dir).name: (draft, training) for draft, training in runs}


def test_arms_differ_in_what_they_are_named_for_alone():
    arms = {name: recipe_of(*run) for name, run in runs_of("arms.yaml").items()}
    differences = {
        ("b", "b_seed1"): {"seed"},
        ("b", "c"): {"draft", "seed"},
        ("c", "d"): {"draft", "replication", "anchors_per_sequence"},
        ("c", "e"): {"replication", "anchors_per_sequence"},
        ("c", "f"): {"draft"},
        ("a", "a_seed1"): {"seed"},
        ("a", "b"): {"stage", "max_steps"},
    }
    for (one, other), names in differences.items():
        changed = {name for name in arms[one] if arms[one][name] != arms[other][name]}
        assert changed == names, (one, other)


def test_stages_follow_from_each_other():
    runs = runs_of("stages.yaml")
    assert [training.stage for _, training in runs.values()] == ["core", "core", "warm_up", "joint"]
    drafts = [draft.draft for draft, _ in runs.values()]
    assert drafts == [None, *[training.output_dir for _, training in runs.values()][:-1]]


def test_the_warm_up_without_mixtures_is_that_of_the_stages_but_for_them():
    stages, plain = (runs_of(name)["warm_up"] for name in ("stages.yaml", "warm_up_plain.yaml"))
    assert plain[1].output_dir == "runs/plain/warm_up"
    one, other = recipe_of(*stages), recipe_of(*plain)
    assert {name for name in one if one[name] != other[name]} == {"draft"}
    new = recipe_of(*runs_of("stages.yaml")["core"])
    assert {name for name in NEW_DRAFT if new[name] != other[name]} == {"num_experts"}
    assert (other["num_experts"], other["draft"]) == (1, None)
    for name in ("save_steps", "eval_steps", "logging_steps", "report_to"):
        assert getattr(stages[1], name) == getattr(plain[1], name)


def test_a_core_and_a_channel_are_combined(tmp_path, monkeypatch, capsys):
    target = make_tiny_target("llama")
    core, channel = make_tiny_draft(target, seed=1), make_tiny_draft(target, seed=2)
    core.save_pretrained(tmp_path / "core")
    channel.save_pretrained(tmp_path / "channel")
    folders = (str(tmp_path / name) for name in ("core", "channel", "both"))
    run_example("train_smollm2/combine.py", monkeypatch, capsys, *folders)
    both = ConFuDraftModel.from_pretrained(tmp_path / "both")
    for name, parameter in both.named_parameters():
        source = channel if name.startswith("future_channel.") else core
        assert torch.equal(parameter, source.get_parameter(name)), name
