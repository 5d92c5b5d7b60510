"""`Chat` and the command around it: every answer is the one that plain `generate` gives to the whole conversation."""

import builtins

import pytest
import torch

from helpers import example_models, make_tiny_draft
from transformers_confu import cli
from transformers_confu.commands import chat as chat_module
from transformers_confu.commands.chat import Chat, converse
from transformers_confu.common import loading
from transformers_confu.common.answer_text import answer_text


OPTIONS = {"max_new_tokens": 20, "do_sample": False}
QUESTIONS = ["What?", "And why?", "Sure?"]
FIRST = "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def models():
    """The tiny target and tokenizer of the examples, whose chat template this is about, and a draft."""
    target, tokenizer = example_models()
    return target.double(), tokenizer, make_tiny_draft(target)


def plain_answer(target, tokenizer, ids: list[int]) -> list[int]:
    prompt = torch.tensor([ids])
    # Without a mask, `generate` would take the marks of the chat for padding.
    return target.generate(prompt, attention_mask=torch.ones_like(prompt), **OPTIONS)[0, len(ids) :].tolist()


@pytest.mark.parametrize("ends", [False, True], ids=["cut answers", "ended answers"])
def test_answers_are_plain_generates_over_one_cache(models, ends):
    target, tokenizer, draft = models
    if ends:  # whatever token an answer has in its middle ends it
        answer = plain_answer(target, tokenizer, tokenizer(FIRST)["input_ids"])
        target.generation_config.eos_token_id = [300, answer[9]]
    chat = Chat(target, tokenizer, draft)
    ids: list[int] = []
    for number, question in enumerate(QUESTIONS):
        new = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        ids += tokenizer(("<|im_end|>\n" if number else "") + new)["input_ids"]
        expected = plain_answer(target, tokenizer, ids)
        assert chat.ask(question, **OPTIONS) == answer_text(
            tokenizer, expected, target.generation_config.eos_token_id if ends else [1]
        )
        assert draft.last_statistics.draft_state == ("carried" if number else "new")
        ended = ends and expected[-1] in target.generation_config.eos_token_id
        assert ended or len(expected) == 20
        ids += expected[: len(expected) - ended]
        assert chat.ids[0].tolist() == ids
    chat.reset()
    assert chat.ask("And why?", **OPTIONS) and draft.last_statistics.draft_state == "new"


def test_a_template_that_cuts_reasoning_out_starts_over_though_its_marks_are_special_tokens(models):
    """Without its marks the template could not cut it out, and it would stand in the next prompt as the answer."""
    target, tokenizer, draft = models
    answer = plain_answer(target, tokenizer, tokenizer(FIRST)["input_ids"])
    # Whatever token stands in the middle of the answer is a special one, and past answers are cut behind it.
    mark = next(token for token in tokenizer.convert_ids_to_tokens(answer[5:]) if token.isascii())
    tokenizer.add_special_tokens({"extra_special_tokens": [mark]})
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content']", f"message['content'].split({mark!r})[-1]"
    )
    chat = Chat(target, tokenizer, draft)
    said = chat.ask("What?", **OPTIONS)
    assert mark in said and said == answer_text(tokenizer, answer, [1])
    rest = f"{said.split(mark)[-1]}<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    expected = plain_answer(target, tokenizer, tokenizer(FIRST + rest)["input_ids"])
    assert chat.ask("Why?", **OPTIONS) == answer_text(tokenizer, expected, [1])
    assert draft.last_statistics.draft_state == "new"


def test_a_tokenizer_that_cannot_read_what_it_renders_gets_its_own_ids(models, monkeypatch):
    """As mistral-common's: the text of a rendered conversation is not tokenised into the marks that it shows."""
    target, tokenizer, draft = models
    own = tokenizer.apply_chat_template

    def with_a_mark_that_has_no_text(messages, tokenize=True, **options):
        encoded = own(messages, tokenize=tokenize, **options)
        if tokenize:
            encoded["input_ids"] = torch.cat([torch.tensor([[7]]), encoded["input_ids"]], dim=1)
        return encoded

    monkeypatch.setattr(tokenizer, "apply_chat_template", with_a_mark_that_has_no_text)
    chat = Chat(target, tokenizer, draft)
    assert not chat.can_continue
    for question in QUESTIONS[:2]:
        messages = [*chat.messages, {"role": "user", "content": question}]
        ids = [7, *own(messages, add_generation_prompt=True)["input_ids"]]
        assert chat.ask(question, **OPTIONS) == answer_text(tokenizer, plain_answer(target, tokenizer, ids), [1])


def test_an_interrupted_turn_has_not_taken_place(models):
    class Stop:
        def __init__(self):
            self.left = 9

        def put(self, value):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    expected, chat = Chat(*models), Chat(*models)
    for question in QUESTIONS[:2]:
        answer = expected.ask(question, **OPTIONS)
        with pytest.raises(KeyboardInterrupt):
            chat.ask("Something else?", Stop(), **OPTIONS)
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


def test_the_terminal(models, type_in, monkeypatch, capsys):
    chat = Chat(*models)
    own = chat.ask

    def ask(question, streamer, **options):
        if question == "long":  # Ctrl-C stops an answer, not the chat
            raise KeyboardInterrupt
        return own(question, streamer, **options)

    monkeypatch.setattr(chat, "ask", ask)
    type_in("What?", "", "/rest", "/reset", "long", "What?", "/quit", "never read")
    converse(chat, **OPTIONS)
    printed = capsys.readouterr().out
    assert printed.count("[20 tokens, tau ") == 2
    assert "/rest is no command. /reset forgets" in printed
    assert printed.count("Forgotten.") == 1 and "[stopped; this turn is forgotten]" in printed
    assert [message["content"] for message in chat.messages][::2] == ["What?"]
    type_in(KeyboardInterrupt())
    converse(chat)  # ends


def test_the_command(models, type_in, monkeypatch, capsys):
    target, tokenizer, draft = models
    monkeypatch.setattr(loading, "load_target", lambda *arguments: (target, tokenizer))
    monkeypatch.setattr(chat_module, "load_decoding_draft", lambda name, target: draft)
    type_in("What?")
    assert cli.main(["chat", "--max-new-tokens", "5", "--temperature", "0.5", "--system", "Be short."]) == 0
    assert "[5 tokens, tau" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("dtype", "nothing", "expected the name of a torch dtype"),
        ("temperature", "-0.5", "`temperature` is -0.5; it must be at least 0"),
        ("max_new_tokens", "0", "`max_new_tokens` is 0; it must be at least 1"),
    ],
)
def test_wrong_options_end_the_command_in_words(option, value, sentence, offline_hub, capsys):
    assert cli.main(["chat", f"--{option}={value}"]) == 1
    assert sentence in capsys.readouterr().err
