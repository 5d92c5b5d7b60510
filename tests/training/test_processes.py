"""Two processes on the CPU train as one does: with a target that reads every batch, or every row once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from commands import weights_of, write_run
from transformers_confu.training.train import main


SETTINGS = {
    "tokens_per_batch": 4096,  # all rows in one step, whoever computes them
    # Plain steps: Adam makes much of the rounding of small gradients, and Muon may compute in bfloat16.
    "optim": "sgd",
    "use_muon": False,
    "lr_scheduler_type": "constant",
    "learning_rate": 0.05,
    "max_grad_norm": 0,
    "max_steps": 3,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 3,
}


# What `-m transformers_confu.cli` runs, and a look at what it leaves: a process group that is still there when Python
# ends aborts its process now and then.
COMMAND = """
import sys, torch
from transformers_confu.cli import main

status = main(sys.argv[1:])
assert not torch.distributed.is_initialized(), "the process group was not ended"
sys.exit(status)
"""


def history(folder: Path, name: str) -> list[float]:
    state = json.loads((folder / "checkpoint-3" / "trainer_state.json").read_text())
    return [entry[name] for entry in state["log_history"] if name in entry]


def test_two_processes_are_one(saved_target, tmp_path):
    stages = [{"stage": "core"}, {"stage": "contemplation"}, {"stage": "joint"}]
    main([write_run(tmp_path, saved_target, output_dir=str(tmp_path / "one"), stages=stages, **SETTINGS)])
    stages[0] |= {"feature_cache": str(tmp_path / "features")}
    run = write_run(tmp_path, saved_target, output_dir=str(tmp_path / "two"), stages=stages, **SETTINGS)
    (tmp_path / "command.py").write_text(COMMAND)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = subprocess.run(
        [*launcher, str(tmp_path / "command.py"), "train", run],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Stage joint: starts") == 1, "said by one process only"
    for stage in ("core", "contemplation", "joint"):
        one, two = tmp_path / "one" / stage, tmp_path / "two" / stage
        for name, value in weights_of(one).items():
            torch.testing.assert_close(weights_of(two)[name], value, rtol=0, atol=1e-6, msg=f"{stage}: {name}")
        for name in ("accuracy_0", "future_coverage"):
            assert history(two, name) == history(one, name)
        torch.testing.assert_close(*(torch.tensor(history(folder, "loss")) for folder in (two, one)))
        assert (two / "checkpoint-3" / "rng_state_1.pth").exists()
