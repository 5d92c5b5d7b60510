"""Every example runs, with tiny models; in this process, since each start of Python would import torch again."""

import runpy
import sys
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run_example(monkeypatch, capsys):
    """Factory: run `examples/<name>.py --tiny` with further arguments; what it prints."""
    monkeypatch.syspath_prepend(EXAMPLES)  # where Python looks first when it starts a script from there

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--tiny", *arguments])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_generate(run_example):
    printed = run_example("generate")
    assert "draft state new" in printed
    assert "custom_generate gives the same text: True" in printed


def plain_answer(question: str, max_new_tokens: int) -> str:
    """What the tiny target of the examples answers without a draft."""
    from _targets import chat_inputs, load_target

    target, tokenizer = load_target(tiny=True)
    inputs = chat_inputs(target, tokenizer, question)
    ids = target.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True)


def test_streaming_prints_the_targets_own_text(run_example):
    printed = run_example("streaming")
    assert plain_answer("Write a short poem about the sea.", 96) in printed and "draft state new" in printed


def test_a_pipeline_prints_the_targets_own_text(run_example):
    printed = run_example("use_pipeline")
    assert plain_answer("Give me three ideas for a rainy afternoon.", 64) in printed and "draft state new" in printed


def test_chat_carries_the_cache_and_the_drafts_state_from_turn_to_turn(run_example):
    printed = run_example("chat")
    assert printed.count("draft state new") == 1
    assert printed.count("draft state carried") == 2


def test_finetune_trains_and_saves_a_draft_that_decodes(run_example, tmp_path):
    printed = run_example("finetune", "--output", str(tmp_path))
    assert "answers written: 10" in printed
    assert (tmp_path / "draft" / "model.safetensors").is_file()
    assert "draft state new" in printed


def test_every_example_is_tested():
    names = {path.stem for path in EXAMPLES.glob("*.py") if not path.stem.startswith("_")}
    assert names == {"generate", "streaming", "use_pipeline", "chat", "finetune"}
