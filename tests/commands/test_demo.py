"""The demo's command with tiny models, and its verdict on texts that differ."""

import pytest
import torch
from transformers import BatchEncoding

from helpers import make_tiny_draft, make_tiny_target
from transformers_confu import cli
from transformers_confu.commands import demo


class Tokenizer:
    """Characters as ids; no chat template."""

    def apply_chat_template(self, messages, **kwargs):
        ids = torch.tensor([[ord(letter) % 97 for letter in messages[0]["content"]]])
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def decode(self, token_ids, **kwargs):
        return "".join(chr(32 + token) for token in token_ids)


@pytest.fixture
def tiny_demo(monkeypatch):
    """The demo on a tiny target and draft, in the dtype that it asks for."""

    def load_demo_target(dtype, device):
        return make_tiny_target(dtype=dtype), Tokenizer()

    monkeypatch.setattr(demo, "load_demo_target", load_demo_target)
    monkeypatch.setattr(demo, "load_draft", lambda path, dtype: make_tiny_draft(make_tiny_target(dtype=dtype)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


ARGUMENTS = ["--max-new-tokens", "12", "--runs", "2", "--prompt", "Hello", "--prompt", "Bonjour"]


def test_identical_texts_are_shown_once_and_summed_up(tiny_demo, capsys):
    assert demo.main([*ARGUMENTS, "--dtype", "float32"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("12 tokens, identical in both") == 2
    assert "==>" not in printed
    assert printed.count("48 tokens in") == 2  # 2 prompts x 2 runs x 12 tokens, in each arm
    assert "2 of 2 texts" in printed
    assert max(map(len, printed.splitlines())) <= 80


@pytest.mark.parametrize(("dtype", "status"), [("float32", 1), ("bfloat16", 0)])
def test_a_different_text_is_marked_and_an_error_in_float32(tiny_demo, monkeypatch, capsys, dtype, status):
    run = demo.run

    def run_with_another_fourth_token(*arguments):
        token_ids, seconds = run(*arguments)
        if arguments[-1] is None:
            token_ids = [*token_ids[:3], (token_ids[3] + 1) % 97, *token_ids[4:]]
        return token_ids, seconds

    monkeypatch.setattr(demo, "run", run_with_another_fourth_token)
    # In bfloat16 this tiny target may differ by itself; the exit status must not depend on it.
    assert demo.main([*ARGUMENTS, "--dtype", dtype]) == status
    printed = capsys.readouterr()
    assert "different from token" in printed.out and "==>" in printed.out
    assert ("bf16 kernels round" in printed.out) == (dtype == "bfloat16")
    assert ("make exactness" in printed.err) == (dtype == "float32")


def test_a_draft_that_is_not_there_ends_the_demo_in_one_sentence(tmp_path, capsys):
    assert cli.main(["demo", "--draft", str(tmp_path / "nothing")]) == 1
    assert "is no folder and cannot be had from the Hub (" in capsys.readouterr().err
    assert cli.main(["demo", "--draft", str(tmp_path)]) == 1
    assert "holds no draft that can be read (" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("one", "other", "common"), [([1, 2, 3], [1, 2, 3], 3), ([1, 2, 3], [1, 4, 3], 1), ([1, 2], [1, 2, 3], 2)]
)
def test_first_difference(one, other, common):
    assert demo.first_difference(one, other) == common
