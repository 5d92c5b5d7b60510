"""The commands of the migration guide, run on a tiny target: from an EAGLE-3 draft to a trained ConFu draft."""

import builtins
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eagle3_source import Source
from helpers import example_models
from transformers_confu import ConFuDraftModel
from transformers_confu.cli import main


ROOT = Path(__file__).parents[2]
TINY = "--use_cpu=True --report_to=none --disable_tqdm=True --max_steps=2 --tokens_per_batch=128 --eval_rows=0".split()


@pytest.fixture
def guide(tmp_path, monkeypatch) -> str:
    """The guide, with folders of this test for the names in it, in whose folder the test runs."""
    target, tokenizer = example_models()
    config = target.config
    target.save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    sizes = {"hidden_size": config.hidden_size, "target_hidden_size": config.hidden_size}
    sizes |= {"vocab_size": config.vocab_size, "draft_vocab_size": 200}
    Source("flat", (1, 2, config.num_hidden_layers - 1), **sizes).write(tmp_path / "source", "bin")
    with open(tmp_path / "answers.jsonl", "w") as file:
        for number in range(12):
            print(json.dumps({"prompt": f"question {number}", "answer_ids": [*range(40, 60 + number)]}), file=file)
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "migrate_from_eagle3.md").read_text(encoding="utf-8")
    return text.replace("yuhuili/EAGLE3-LLaMA3.1-Instruct-8B", "source").replace(
        "meta-llama/Llama-3.1-8B-Instruct", "target"
    )


def test_the_guide_leads_to_a_trained_draft(guide, monkeypatch, capsys):
    [settings] = re.findall(r"```yaml\n(.*?)```", guide, flags=re.DOTALL)
    Path("migrate.yaml").write_text(settings)
    lines = [line for block in re.findall(r"```bash\n(.*?)```", guide, flags=re.DOTALL) for line in block.splitlines()]
    commands = [shlex.split(line) for line in lines]
    assert [command[1] for command in commands] == ["convert", "train", "chat", "convert", "convert"]
    commands.insert(1, "confu check target runs/converted".split())
    answers = iter(["question 3"])

    def ask(prompt: str) -> str:
        if (line := next(answers, None)) is None:
            raise EOFError
        return line

    monkeypatch.setattr(builtins, "input", ask)
    monkeypatch.setattr(sys, "argv", ["confu"])
    for command in commands:
        extra = {"train": TINY, "chat": ["--max-new-tokens", "12"]}.get(command[1], [])
        assert main(command[1:] + extra) == 0, command
    output = capsys.readouterr().out
    assert "runs/converted fits target." in output and "tau" in output

    converted, warmed, trained = (
        ConFuDraftModel.from_pretrained(f"runs/{name}", dtype=torch.float32)
        for name in ("converted", "migrated/contemplation", "migrated/joint")
    )
    # The channel of a converted draft is off, and on from its first training; the core learns in the last stage only.
    assert converted.generation_config.confu_contemplation == 0
    assert not any(hasattr(draft.generation_config, "confu_contemplation") for draft in (warmed, trained))
    assert torch.equal(converted.fc.weight, warmed.fc.weight) and not torch.equal(warmed.fc.weight, trained.fc.weight)
    for form in ("exported-for-sglang", "exported"):
        assert torch.equal(load_file(f"{form}/model.safetensors")["fc.weight"], trained.fc.weight)
