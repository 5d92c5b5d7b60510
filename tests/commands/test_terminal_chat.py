"""`Chat` and the command around it: every answer is the one that plain `generate` gives to the whole conversation."""

import builtins
import sys
from pathlib import Path

import pytest
import torch

from helpers import make_tiny_draft
from transformers_confu import cli
from transformers_confu.commands import chat as chat_module
from transformers_confu.commands.chat import Chat, converse


OPTIONS = {"max_new_tokens": 20, "do_sample": False}
QUESTIONS = ["What?", "And why?", "Sure?"]


@pytest.fixture
def models(monkeypatch):
    """The tiny target and tokenizer of the examples, whose chat template this is about, and a draft."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    from _targets import tiny_target, tiny_tokenizer

    target = tiny_target().double()
    yield target, tiny_tokenizer(), make_tiny_draft(target)
    sys.modules.pop("_targets")


def plain_answer(target, tokenizer, ids: list[int]) -> list[int]:
    prompt = torch.tensor([ids])
    # Without a mask, `generate` would take the marks of the chat for padding.
    return target.generate(prompt, attention_mask=torch.ones_like(prompt), **OPTIONS)[0, len(ids) :].tolist()


@pytest.mark.parametrize("ends", [False, True], ids=["cut answers", "ended answers"])
def test_answers_are_plain_generates_over_one_cache(models, ends):
    target, tokenizer, draft = models
    if ends:  # whatever token an answer has in its middle ends it
        first = tokenizer("<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
        target.generation_config.eos_token_id = [300, plain_answer(target, tokenizer, first)[9]]
    chat = Chat(target, tokenizer, draft)
    ids: list[int] = []
    for number, question in enumerate(QUESTIONS):
        new = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        ids += tokenizer(("<|im_end|>\n" if number else "") + new)["input_ids"]
        expected = plain_answer(target, tokenizer, ids)
        assert chat.ask(question, **OPTIONS) == tokenizer.decode(expected, skip_special_tokens=True)
        assert draft.last_statistics.draft_state == ("carried" if number else "new")
        ended = ends and expected[-1] in target.generation_config.eos_token_id
        assert ended or len(expected) == 20
        ids += expected[: len(expected) - ended]
        assert chat.ids[0].tolist() == ids
    chat.reset()
    assert chat.ask("And why?", **OPTIONS) and draft.last_statistics.draft_state == "new"


def test_a_template_that_rewrites_past_answers_starts_over(models):
    target, tokenizer, draft = models
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content']", "message['content'][-4:]")
    chat = Chat(target, tokenizer, draft)
    for question in QUESTIONS[:2]:
        ids = tokenizer.apply_chat_template(
            [*chat.messages, {"role": "user", "content": question}], add_generation_prompt=True
        )["input_ids"]
        expected = plain_answer(target, tokenizer, ids)
        assert chat.ask(question, **OPTIONS) == tokenizer.decode(expected, skip_special_tokens=True)
        assert draft.last_statistics.draft_state == "new"


def test_an_interrupted_turn_has_not_taken_place(models):
    target, tokenizer, draft = models

    class Stop:
        def __init__(self, after):
            self.left = after

        def put(self, value):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

        def end(self):
            pass

    expected = Chat(target, tokenizer, draft)
    answers = [expected.ask(question, **OPTIONS) for question in QUESTIONS[:2]]
    chat = Chat(target, tokenizer, draft)
    for question, answer in zip(QUESTIONS, answers, strict=False):
        with pytest.raises(KeyboardInterrupt):
            chat.ask("Something else?", Stop(after=9), **OPTIONS)
        assert chat.ask(question, **OPTIONS) == answer
    assert chat.messages == expected.messages


def test_a_base_model_and_a_foreign_draft_are_refused(models):
    target, tokenizer, draft = models
    template, tokenizer.chat_template = tokenizer.chat_template, None
    with pytest.raises(ValueError, match="has no chat template"):
        Chat(target, tokenizer, draft)
    tokenizer.chat_template = template
    target.config.num_hidden_layers = 9
    with pytest.raises(ValueError, match="made for a target with `num_hidden_layers=4`"):
        Chat(target, tokenizer, draft)


@pytest.fixture
def type_in(monkeypatch):
    """Let the user type lines; an exception stands for a key."""

    def install(*lines):
        remaining = iter([*lines, EOFError()])

        def read(prompt=""):
            line = next(remaining)
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr(builtins, "input", read)

    return install


def test_the_terminal(models, type_in, capsys):
    target, tokenizer, draft = models
    chat = Chat(target, tokenizer, draft)
    type_in("What?", "", "/rest", "/reset", "What?", "/quit", "never read")
    converse(chat, **OPTIONS)
    printed = capsys.readouterr().out
    assert printed.count("[20 tokens, tau ") == 2
    assert "/rest is no command. /reset forgets" in printed
    assert printed.count("Forgotten.") == 1
    assert [message["content"] for message in chat.messages][::2] == ["What?"]
    type_in(KeyboardInterrupt())
    converse(chat)  # ends


def test_ctrl_c_stops_an_answer_not_the_chat(models, type_in, monkeypatch, capsys):
    chat = Chat(*models)
    own = chat.ask

    def ask(question, streamer, **options):
        if question == "long":
            raise KeyboardInterrupt
        return own(question, streamer, **options)

    monkeypatch.setattr(chat, "ask", ask)
    type_in("long", "short")
    converse(chat, **OPTIONS)
    printed = capsys.readouterr().out
    assert "[stopped; this turn is forgotten]" in printed and "[20 tokens, tau" in printed


def test_the_command(models, type_in, monkeypatch, capsys):
    target, tokenizer, draft = models
    monkeypatch.setattr(chat_module, "load_target", lambda name, dtype, device: (target, tokenizer))
    monkeypatch.setattr(chat_module, "load_draft", lambda name, dtype: draft)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    type_in("What?")
    assert cli.main(["chat", "--max-new-tokens", "5", "--temperature", "0.5", "--system", "Be short."]) == 0
    assert "[5 tokens, tau" in capsys.readouterr().out
    target.config.num_hidden_layers = 9
    assert cli.main(["chat"]) == 1
    assert "made for a target with" in capsys.readouterr().err


def test_a_target_that_is_not_there_ends_the_command_in_words(tmp_path, capsys):
    assert cli.main(["chat", "--target", str(tmp_path / "nothing")]) == 1
    assert str(tmp_path / "nothing") in capsys.readouterr().err
    assert cli.main(["chat", "--dtype", "nothing"]) == 1
    assert "expected the name of a torch dtype" in capsys.readouterr().err
    for option, value in (("--temperature", "-0.5"), ("--max-new-tokens", "0")):
        with pytest.raises(SystemExit):
            cli.main(["chat", option, value])
        assert f"{option} is {value}; it must be at least" in capsys.readouterr().err
