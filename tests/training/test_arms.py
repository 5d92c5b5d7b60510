"""The scripts of the experiments: every arm trains, is counted and goes on where it was interrupted."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_trainer import Interruption, assert_equal, logged, make_draft, make_rows, make_trainer, weights

from commands import write_run
from helpers import make_tiny_target
from transformers_confu import ConFuDraftModel
from transformers_confu.training.train import main


EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.mark.parametrize("group", ["forms", "changes"])
def test_every_arm_trains_and_is_counted(saved_target, tmp_path, monkeypatch, capsys, group):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    monkeypatch.chdir(tmp_path)
    run = Path(write_run(tmp_path, saved_target))
    data = str(next(run.parent.glob("*.jsonl")))
    command = [f"{group}.py", "--output", "runs", "--target", str(saved_target), "--data", data, "--steps", "2"]
    command += ["--ttt_steps", "2", "--max_length", "64", "--tokens_per_batch", "128", "--draft_vocab_size", "50"]
    command += ["--allow_other_target", "true", "--held_out_share", "0.4", "--bf16", "false", "--answers", "3"]
    arms = runpy.run_path(str(EXPERIMENTS / f"{group}.py"))["ARMS"]
    arms = [arm for arm in arms if not arm.startswith("head")]  # of more rank than a tiny target has
    command += ["--arms", *arms]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(str(EXPERIMENTS / f"{group}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    first = None
    for arm in arms:
        counts = json.loads(Path("runs", arm, "counts.json").read_text())["draft"]
        counted = np.array(list(counts.values()))[:, 0]
        first = counted if first is None else first
        assert counted[0, 0] > 0 and (counted == first).all()
        assert f"| {arm} |" in printed
    # The table can be had again without training; cores start alike, whatever stands beside them.
    monkeypatch.setattr(sys, "argv", [*command, "--compare"])
    runpy.run_path(str(EXPERIMENTS / f"{group}.py"), run_name="__main__")
    assert "trained" not in capsys.readouterr().out


def test_cores_start_alike(saved_target, tmp_path):
    run = [write_run(tmp_path, saved_target), "--max_steps=1", "--learning_rate=0", "--stage=joint"]
    forms = {"plain": {}, "form": {"num_contemplate_rows": 2, "future_readout": False, "contemplate_adapter_rank": 2}}
    for name, form in forms.items():
        main([*run, f"--output_dir={tmp_path / name}", f"--draft_config={json.dumps(form)}"])
    plain, other = (ConFuDraftModel.from_pretrained(tmp_path / name).state_dict() for name in forms)
    same = [name for name in plain if not name.startswith("future_channel.")]
    assert len(same) > 10
    assert_equal({name: plain[name] for name in same}, {name: other[name] for name in same})


@pytest.mark.parametrize(
    "settings, form",
    [
        ({"stage": "core", "muon": 3e-3, "on_policy": "guesses"}, {}),
        ({"stage": "core", "on_policy": "roots"}, {"head_rank": 4}),
        ({"stage": "joint", "foresight": 0.5}, {"num_contemplate_rows": 2, "contemplate_adapter_rank": 2}),
        ({"stage": "joint"}, {"future_readout": True, "use_future_residual": False}),
    ],
    ids=["Muon, guesses", "roots, low rank", "ordered", "read-out"],
)
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, settings, form):
    target = make_tiny_target(dtype=torch.float32)
    rows = make_rows(target, [12, 30, 18, 24, 9, 30])
    settings = settings | {"train_dataset": rows, "max_steps": 5, "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(target, tmp_path / "whole", make_draft(target, **form), **settings)
    before = {name: value.clone() for name, value in weights(whole.model).items()}
    whole.train()
    for name, value in weights(whole.model).items():
        moved = not torch.equal(value, before[name])
        assert moved == (settings["stage"] == "joint" or not name.startswith("future_channel.")), name
    interrupted = make_trainer(
        target, tmp_path / "resumed", make_draft(target, **form), **settings, callbacks=[Interruption(3)]
    )
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    resumed = make_trainer(target, tmp_path / "resumed", make_draft(target, seed=9, **form), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_equal(weights(resumed.model), weights(whole.model))
    assert logged(resumed, "loss") == logged(whole, "loss")
