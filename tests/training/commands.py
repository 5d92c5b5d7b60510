"""Runs of the training command on a tiny target."""

import json
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file


def write_run(folder: Path, saved_target: Path, **options) -> str:
    """A YAML file of options for the training command, over a few rows of data."""
    generator = torch.Generator().manual_seed(0)
    with open(folder / "data.jsonl", "w") as file:
        for number in range(12):
            answer = torch.randint(96, (12 + number,), generator=generator).tolist()
            print(json.dumps({"prompt": f"question {number}", "answer_ids": answer + [96]}), file=file)
    settings = {
        "target": str(saved_target),
        "target_dtype": "float32",
        "data": [str(folder / "data.jsonl")],
        "draft_vocab_size": 50,
        "draft_config": {"num_soft_prompts": 5},
        "instruction": "abc",
        "held_out_share": 0.25,
        "eval_rows": 3,
        "output_dir": str(folder / "draft"),
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "tokens_per_batch": 128,
        "ttt_steps": 2,
        "max_steps": 3,
        "save_strategy": "no",
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings | options))
    return str(folder / "run.yaml")


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")
