"""The demo's command with tiny models, and its verdict on texts that differ."""

import pytest

from helpers import make_tiny_draft, make_tiny_target
from transformers_confu import cli
from transformers_confu.commands import demo
from transformers_confu.evaluation.answering import Models
from transformers_confu.evaluation.arguments import EvaluationArguments


class Tokenizer:
    """Characters as ids."""

    def apply_chat_template(self, messages, **kwargs):
        return [ord(letter) % 97 for letter in messages[0]["content"]]

    def decode(self, token_ids, **kwargs):
        return "".join(chr(32 + token) for token in token_ids)


@pytest.fixture
def tiny_demo(monkeypatch):
    """The demo on a tiny target and draft, which writes what plain `generate` does in float64 only by name."""

    def load(arguments, dtype):
        target = make_tiny_target()
        return Models(arguments, target, Tokenizer(), {"draft": make_tiny_draft(target)})

    monkeypatch.setattr(Models, "load", load)


ARGUMENTS = ["--max-new-tokens", "12", "--runs", "2", "--prompt", "Hello", "--prompt", "Bonjour"]


def test_texts_are_shown_once_and_summed_up(tiny_demo, capsys):
    assert demo.main([*ARGUMENTS, "--dtype", "float32"]) == 0
    printed = capsys.readouterr().out
    target = make_tiny_target()
    for prompt in ("Hello", "Bonjour"):
        ids = Tokenizer().apply_chat_template([{"content": prompt}])
        text = target.generate(target.dummy_inputs["input_ids"].new_tensor([ids]), do_sample=False, max_new_tokens=12)
        words = Tokenizer().decode(text[0, len(ids) :].tolist()).split()
        assert " ".join(words) in " ".join(printed.split())
    assert printed.count("the same text") == 2 and "==>" not in printed
    assert "2 of 2 texts" in printed and "the median of 2 interleaved runs" in printed


@pytest.mark.parametrize(
    ("dtype", "gap", "status"), [("float32", 0.5, 1), ("float32", 1e-5, 0), ("float32", None, 1), ("bfloat16", 0.5, 0)]
)
def test_a_different_text_is_marked_and_an_error_only_where_rounding_does_not_explain_it(
    tiny_demo, monkeypatch, capsys, dtype, gap, status
):
    own = Models.answer

    def with_another_fourth_token(*arguments):
        unit = own(*arguments)
        confu = unit["answers"][1]
        ids = confu["turns"][0]["token_ids"]
        ids[3] = (ids[3] + 1) % 97
        confu["departure"] = {"turn": 0, "position": 3, "gap": gap}
        return unit

    monkeypatch.setattr(Models, "answer", with_another_fourth_token)
    assert demo.main([*ARGUMENTS, "--dtype", dtype]) == status
    printed = capsys.readouterr()
    assert "parts from it at token 4" in printed.out and "==>" in printed.out and "0 of 2 texts" in printed.out
    assert ("bf16 kernels round" in printed.out) == (dtype == "bfloat16")
    assert ("Not explained by rounding" in printed.err) == bool(status)


def test_what_is_wrong_ends_the_demo_in_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(EvaluationArguments, "load", lambda *_: (make_tiny_target(), Tokenizer()))
    for argument, sentence in (
        (f"--draft={tmp_path / 'nothing'}", "is no folder and cannot be had from the Hub ("),
        (f"--draft={tmp_path}", "holds no draft that can be read ("),
        ("--runs=0", "`runs` is 0; expected at least 1"),
    ):
        assert cli.main(["demo", argument]) == 1
        assert sentence in capsys.readouterr().err
