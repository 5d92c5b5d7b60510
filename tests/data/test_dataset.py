"""Rows to labelled ids, against references written out by hand."""

import copy
import json
import os
import subprocess
import sys
from functools import cache
from itertools import groupby
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from transformers_confu.data.chat_template import TEMPLATE_DATE, encode_prompt
from transformers_confu.data.dataset import (
    DatasetReport,
    prepare_dataset,
    sequence_lengths,
    split_by_prompt,
)
from transformers_confu.data.encoding import RowEncoder, prompt_hash


PLAIN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# With the markers that TRL reads, and white space behind the end of a turn.
MARKED_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>  {% endgeneration %}\n{% else %}{{ m['content'] }}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@cache
def byte_tokenizer(template: str | None = PLAIN_TEMPLATE, trim_offsets: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte, so that labels can be compared as text, character by character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", extra_special_tokens=["<|im_start|>"]
    )
    fast.chat_template = template
    return fast


def labelled_texts(tokenizer: PreTrainedTokenizerFast, row: dict) -> list[str]:
    """Text of every run of labelled tokens; checks that labels are the ids of their positions."""
    runs = []
    pairs = list(zip(row["input_ids"], row["labels"], strict=True))
    assert all(label in (-100, token) for token, label in pairs)
    for labelled, run in groupby(pairs, key=lambda pair: pair[1] != -100):
        if labelled:
            runs.append(tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False))
    return runs


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, MARKED_TEMPLATE], ids=["plain", "marked"])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_labels_are_the_answers_with_their_end_of_turn(template, trim_offsets, data):
    tokenizer = byte_tokenizer(template, trim_offsets)
    content = st.text(alphabet="ab .\né漢", min_size=1, max_size=12)
    turns = data.draw(st.lists(st.tuples(content, content), min_size=1, max_size=3))
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    if data.draw(st.booleans()):
        messages.insert(0, {"role": "system", "content": "be brief"})
    if data.draw(st.booleans()):
        messages.append({"role": "user", "content": "thanks"})

    row = prepare_dataset([{"messages": messages}], tokenizer, 10_000)[0]

    assert labelled_texts(tokenizer, row) == [answer + "<|im_end|>" for _, answer in turns]
    assert tokenizer.decode(row["input_ids"]) == tokenizer.apply_chat_template(messages, tokenize=False)


def test_ids_are_kept_as_they_are():
    tokenizer, answer = byte_tokenizer(), [5, 4, 200, 9]  # no text any tokenizer would write this way
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    for prompt, text in (
        ("hé", "<|im_start|>user\nhé<|im_end|>\n<|im_start|>assistant\n"),
        (messages, "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n"),
    ):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert encode_prompt(prompt, tokenizer) == ids
        row = prepare_dataset([{"prompt": prompt, "answer_ids": answer}], tokenizer, 1000)[0]
        assert (row["input_ids"], row["labels"]) == (ids + answer, [-100] * len(ids) + answer)
    # The very prompt that was answered, as a template of another day rendered it.
    row = answered(tokenizer, [("q", "a")]) | {"prompt_ids": [[7, 8, 9]]}
    assert prepare_dataset([row], tokenizer, 100)[0]["input_ids"] == [7, 8, 9, *row["answer_ids"][0]]


def test_report_counts_what_is_cut_and_dropped():
    rows = [
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
        {"input_ids": [1, 2, 3, 4, 5, 6], "labels": [-100, 2, 3, -100, 5, 6]},
        {"input_ids": [1, 2, 3, 4, 5, 6], "labels": [-100, 2, 3, -100, -100, -100]},
        {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, -100, -100, -100, 5]},
        {"input_ids": [1, 2], "labels": [-100, -100]},
        {"prompt": "hi", "answer_ids": []},
    ]
    report = DatasetReport()
    dataset = prepare_dataset(rows, byte_tokenizer(), 4, report=report)
    assert dataset["input_ids"][:] == [[1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4]]
    assert dataset["labels"][:] == [[-100, 2, 3], [-100, 2, 3, -100], [-100, 2, 3, -100]]
    assert sequence_lengths(dataset) == [3, 4, 4]
    assert report == DatasetReport(
        rows_in=6, rows_kept=3, rows_dropped=3, answers_cut=1, tokens=11, assistant_tokens=6
    )
    for part in ("3 made of 6", "in the maximum length: 3", "wrote 6"):
        assert part in str(report)


def test_many_rows_keep_their_order_and_prepared_rows_pass_through():
    rows = [{"input_ids": [1, index % 200], "labels": [-100, index % 200]} for index in range(2500)]
    dataset = prepare_dataset(iter(rows), byte_tokenizer(), 8)
    assert dataset.remove_columns("prompt_hash").to_list() == rows
    assert prepare_dataset(dataset, byte_tokenizer(), 8).to_list() == dataset.to_list()


USER = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}
CALLS_TEMPLATE = PLAIN_TEMPLATE.replace(
    "<|im_end|>\n", "{% for c in m.tool_calls or [] %}{{ 'call ' + c.arguments }}{% endfor %}<|im_end|>\n"
)
HINT_TEMPLATE = PLAIN_TEMPLATE.replace("assistant\n{% endif", "assistant\n<hint>{% endif")
ANSWERED = {"prompt": "a", "answer_ids": [1]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, r"Row 0: it has the fields \['text'\], expected 'messages'"),
        ({"conversations": [{"from": "human"}]}, "prompts without 'answer_ids': .* answer them first"),
        ({"messages": "hello"}, "expected a non-empty list of messages"),
        ({"messages": [{**USER, "content": None}]}, "expected a message with a role and a content"),
        ({"messages": [{**USER, "content": 3}]}, "the content 3, expected text or a list of text"),
        ({"messages": [{**USER, "content": [{"type": "image"}]}]}, "parts of type 'text' only"),
        ({"messages": [{"role": "human", "content": "a"}]}, "the role 'human', expected roles such"),
        ({"messages": [ANSWER]}, "first message is the assistant's"),
        ({"prompt": 3, "answer_ids": [1]}, "'prompt' is 3"),
        ({"prompt": "a", "answer_ids": [999_999]}, "another tokenizer"),
        ({"prompt": "a", "answer_ids": [1.5]}, "not integers"),
        ({"input_ids": [1, 2], "labels": [2]}, "2 input_ids and 1 labels"),
        ({"input_ids": [1, 2], "labels": [2, -100]}, "labels are not shifted"),
        ({"messages": [USER], "tools": 3}, "'tools' is 3, expected a list of JSON schemas"),
        ({"messages": [USER], "tools": "[{"}, r"'tools' is '\[\{', which is not valid JSON"),
        ({**ANSWERED, "chat_template_kwargs": "[1]"}, r"_kwargs' is \[1\], expected an object"),
        ({**ANSWERED, "chat_template_kwargs": {"tokenize": False}}, "names tokenize, which is not"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{}]}]}, "template leaves 'tool_calls' out, so the"),
    ],
)
def test_malformed_rows_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        prepare_dataset([row], byte_tokenizer(), 100)


@pytest.mark.parametrize(
    ("row", "template", "message"),
    [
        ({"messages": [{**USER, "tool_calls": [{"arguments": {}}]}]}, CALLS_TEMPLATE, "refuses the messages: .*conca"),
        (ANSWERED, "{{ raise_exception('must alternate') }}", "Row 0: .*refuses the messages: must alternate"),
        (ANSWERED, None, "chat_template"),
        ({"messages": [USER, ANSWER]}, HINT_TEMPLATE, "behind messages 0 to 0 is not what it renders before mess"),
    ],
)
def test_templates_that_cannot_be_used_are_refused(row, template, message):
    with pytest.raises(ValueError, match=message):
        prepare_dataset([row], byte_tokenizer(template), 100)


@pytest.mark.parametrize(
    ("rows", "max_length", "message"),
    [
        ([ANSWERED], 3, "None of 1 rows holds an assistant token among its first 3"),
        ([], 3, "None of 0 rows"),
        ([], 1, "max_length is 1"),
        (DatasetDict(dict.fromkeys("ab", Dataset.from_list([USER]))), 10, "the splits a, b: give one"),
    ],
)
def test_data_without_anything_to_learn_is_refused(rows, max_length, message):
    with pytest.raises(ValueError, match=message):
        prepare_dataset(rows, byte_tokenizer(), max_length)


# Like Qwen3's: reasoning of earlier turns is dropped, the newest answer always has some.
REASONING_TEMPLATE = (
    "{% if tools %}<tools>{{ tools | length }}</tools>{% endif %}"
    "{% for m in messages %}{% set text = m['content'].split('</think>')[-1] %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] != 'assistant' or not loop.last %}{{ text }}"
    "{% elif '</think>' in m['content'] %}{{ m['content'] }}{% else %}<think></think>{{ text }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)


def test_answers_of_a_template_that_rewrites_history_become_rows_of_their_own():
    tokenizer = byte_tokenizer(REASONING_TEMPLATE)
    contents = ["q", "<think>hm</think>a", "r", "<think>so</think>b"]
    messages = [
        {"role": role, "content": content} for role, content in zip(("user", "assistant") * 2, contents, strict=True)
    ]
    report = DatasetReport()
    rows = prepare_dataset([{"messages": messages}], tokenizer, 1000, report=report)
    assert [labelled_texts(tokenizer, row) for row in rows] == [
        ["<think>hm</think>a<|im_end|>"],
        ["<think>so</think>b<|im_end|>"],
    ]
    assert [tokenizer.decode(row["input_ids"]) for row in rows] == [
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>hm</think>a<|im_end|>\n",
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
        "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n<think>so</think>b<|im_end|>\n",
    ]
    assert (report.rows_in, report.rows_kept, report.rows_dropped) == (1, 2, 0)
    assert "2 made of 1" in str(report)


def answered(tokenizer, said, **fields):
    """An answered conversation, as the target answers it turn by turn."""
    messages, row = [], {"prompt_ids": [], "answer_ids": [], **fields}
    for question, answer in said:
        messages.append({"role": "user", "content": question})
        row["prompt_ids"].append(encode_prompt(messages, tokenizer))
        row["answer_ids"].append(tokenizer(answer + "<|im_end|>", add_special_tokens=False)["input_ids"])
        messages.append({"role": "assistant", "content": answer})
    return row | {"messages": messages}


@pytest.mark.parametrize("with_prompts", [True, False])
def test_an_answered_conversation_is_one_row_where_its_turns_go_on_from_each_other(with_prompts):
    tokenizer = byte_tokenizer()
    a = answered(tokenizer, [("q", "one"), ("r", "two"), ("s", "three")])
    b = answered(tokenizer, [("q", "x"), ("r", "y")])
    b["answer_ids"][0] = b["answer_ids"][0][:-1]  # without the token that ends it, which the next prompt writes
    if not with_prompts:
        del a["prompt_ids"], b["prompt_ids"]
    rows = prepare_dataset([a, b], tokenizer, 1000)
    assert [labelled_texts(tokenizer, row) for row in rows] == [
        ["one<|im_end|>", "two<|im_end|>", "three<|im_end|>"],
        ["x", "y<|im_end|>"],
    ]
    text = tokenizer.apply_chat_template(a["messages"], tokenize=False)
    assert tokenizer.decode(rows[0]["input_ids"]) == text.rstrip("\n")

    # A template that drops earlier reasoning: every turn as the target saw it.
    tokenizer = byte_tokenizer(REASONING_TEMPLATE)
    c = answered(tokenizer, [("q", "<think>1</think>one"), ("r", "<think>2</think>two")])
    rows = prepare_dataset([c], tokenizer, 1000)
    assert [labelled_texts(tokenizer, row) for row in rows] == [
        ["<think>1</think>one<|im_end|>"],
        ["<think>2</think>two<|im_end|>"],
    ]


def test_answers_of_another_target_are_refused():
    row = {"prompt": "a", "answer_ids": [1], "made_with": {"target": "old", "seed": 0}}
    for made_with in (row["made_with"], json.dumps(row["made_with"])):
        rows = [row | {"made_with": made_with}]
        for made_by in (None, "old"):
            assert len(prepare_dataset(rows, byte_tokenizer(), 100, made_by=made_by)) == 1
        with pytest.raises(ValueError, match=r"Row 0: .* another target \(old\) than the one to train for \(new\)"):
            prepare_dataset(rows, byte_tokenizer(), 100, made_by="new")
    for other in (
        {"prompt": "a", "answer_ids": [1]},
        {"messages": answered(byte_tokenizer(), [("q", "a")])["messages"]},
    ):
        assert len(prepare_dataset([other], byte_tokenizer(), 100, made_by="new")) == 1


def test_options_of_the_template_come_with_the_row():
    tokenizer = byte_tokenizer(REASONING_TEMPLATE)
    question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    off = {"enable_thinking": False, "unused": None}
    ids = tokenizer("a<|im_end|>")["input_ids"]
    rows = [
        {"messages": [question, answer], "tools": None, "chat_template_kwargs": None},
        {"messages": [question, {**answer, "tool_calls": None}], "chat_template_kwargs": off},
        {"messages": [question, answer], "tools": tools, "chat_template_kwargs": off},
        {"prompt": "q", "answer_ids": ids, "tools": json.dumps(tools), "chat_template_kwargs": json.dumps(off)},
    ]
    dataset = prepare_dataset(rows, tokenizer, 1000)
    assert [labelled_texts(tokenizer, row) for row in dataset] == [
        ["<think></think>a<|im_end|>"],
        ["a<|im_end|>"],
        ["a<|im_end|>"],
        ["a<|im_end|>"],
    ]
    texts = [tokenizer.decode(row["input_ids"]).rstrip("\n") for row in dataset]
    assert texts[0] == texts[1] and texts[2] == texts[3] == "<tools>1</tools>" + texts[0]


# Splits


def rows_of_prompts(prompts, answer=1):
    return [{"prompt": prompt, "answer_ids": [answer, answer]} for prompt in prompts]


def test_every_answer_to_a_prompt_is_on_one_side_in_every_stage():
    """Stage one trains on [a, b], stage two on [a] with another length; twins, second turns, other spellings."""
    tokenizer = byte_tokenizer()
    prompts = [f"Question {number}" for number in range(300)]
    greedy, sampled = rows_of_prompts(prompts, 1), rows_of_prompts([f" question  {n}\n" for n in range(300)], 2)
    turns = [answered(tokenizer, [(prompt, "one"), ("And then?", "two")]) for prompt in prompts]
    ids = [{"messages": row["messages"]} for row in turns]
    core, held_out = split_by_prompt(prepare_dataset(greedy + sampled, tokenizer, 1000), 0.1)
    assert len(core) + len(held_out) == 600 and 2 * 15 < len(held_out) < 2 * 50
    never = set(held_out["prompt_hash"])
    assert not never & set(core["prompt_hash"])
    for rows, max_length in ((greedy, 1000), (list(reversed(turns)), 90), (ids[::3], 1000), (turns + sampled, 300)):
        joint, other = split_by_prompt(prepare_dataset(rows, tokenizer, max_length), 0.1, num_rows=5)
        assert not never & set(joint["prompt_hash"])
        assert set(other["prompt_hash"]) <= never and len(other) == 5
    # Few of them are the same in any order.
    turned = core.select(range(len(core) - 1, -1, -1))
    one, other = (split_by_prompt(rows, 0.2, 7)[1]["prompt_hash"][:] for rows in (core, turned))
    assert one == other
    assert prompt_hash("Question 1") == prompt_hash("ques\uff54ion\t1 ") != prompt_hash("Question 2")


def test_splits_that_leave_one_side_empty_are_refused():
    dataset = prepare_dataset(rows_of_prompts(["a", "b"]), byte_tokenizer(), 100)
    assert split_by_prompt(dataset, 0) == (dataset, None)
    with pytest.raises(ValueError, match=r"None of 2 prompts is held out by a share of 1e-09"):
        split_by_prompt(dataset, 1e-9)
    with pytest.raises(ValueError, match=r"Every one of 2 prompts is held out"):
        split_by_prompt(dataset, 0.999999)
    with pytest.raises(ValueError, match="share of held-out prompts is 1, expected"):
        split_by_prompt(dataset, 1)


# The cache


def test_rows_are_tokenised_once_for_all_stages_and_again_when_anything_changes(tmp_path, monkeypatch):
    calls = []
    encode = RowEncoder.__call__
    monkeypatch.setattr(RowEncoder, "__call__", lambda *args, **kwargs: calls.append(1) or encode(*args, **kwargs))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of_prompts(["first", "second"])))
    tokenizer = copy.deepcopy(byte_tokenizer())
    first = prepare_dataset(path, tokenizer, 50)
    assert len(calls) == 1 and first.cache_files
    tokenizer(["a", "bcd"], truncation=True, max_length=2)  # leaves its settings in the tokenizer
    again = prepare_dataset([str(path)], tokenizer, 50)
    assert len(calls) == 1 and again.to_list() == first.to_list()
    assert again.cache_files == first.cache_files
    for number, changed in enumerate(({"max_length": 49}, {"vocab_size": 300}, {"made_by": "x"})):
        prepare_dataset(path, tokenizer, **({"max_length": 50} | changed))
        assert len(calls) == 2 + number
    tokenizer.chat_template = PLAIN_TEMPLATE.replace("im_start", "start")
    assert prepare_dataset(path, tokenizer, 50).to_list() != first.to_list()
    path.write_text(json.dumps(rows_of_prompts(["third"])[0]))
    assert len(prepare_dataset(path, tokenizer, 50)) == 1


@pytest.mark.slow
def test_many_rows_take_little_memory(tmp_path):
    """A process that prepares 60,000 rows (70 MB of ids) grows by less than half of what their Python lists take."""
    program = """
import json, resource, sys
from transformers_confu.data import prepare_dataset
sys.path.insert(0, sys.argv[1])
from test_dataset import byte_tokenizer
with open(sys.argv[2], "w") as file:
    for number in range(60_000):
        row = {"prompt": f"Question {number}", "answer_ids": [number % 200] * 150}
        file.write(json.dumps(row) + "\\n")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
dataset = prepare_dataset(sys.argv[2], byte_tokenizer(), 300, num_proc=2)
print(len(dataset), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    folders = [str(Path(__file__).parent), str(tmp_path / "rows.jsonl")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "HF_DATASETS_CACHE": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", program, *folders], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows, kilobytes = map(int, result.stdout.split())
    assert rows == 60_000 and kilobytes < 250_000


# Faults that were found from outside


def test_nulls_in_a_message_do_not_shift_the_labels():
    tokenizer = byte_tokenizer(MARKED_TEMPLATE.replace("m['content'] }}<", "m['content'] }}{{ m.tool_calls }}<"))
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    question = {"role": "user", "content": "weather?"}
    messages = [question, call, {"role": "tool", "content": "sun"}, {"role": "assistant", "content": "It is sunny."}]
    without_content = [question, {key: value for key, value in call.items() if key != "content"}, *messages[2:]]
    for said in (messages, without_content):
        row = prepare_dataset([{"messages": said}], tokenizer, 1000)[0]
        assert labelled_texts(tokenizer, row) == ["[{'name': 'f'}]<|im_end|>", "It is sunny.<|im_end|>"]


def test_ids_are_those_of_the_tokenizers_own_chat_template():
    """Of tokenizers whose text cannot be tokenised again, such as mistral-common's."""

    class Own(PreTrainedTokenizerFast):
        is_fast = False

        def apply_chat_template(self, messages, tokenize=True, return_dict=True, **kwargs):
            assert tokenize and return_dict
            return {"input_ids": [7, *(len(message["content"]) for message in messages)]}

    tokenizer = Own(tokenizer_object=byte_tokenizer().backend_tokenizer)
    tokenizer.chat_template = PLAIN_TEMPLATE
    assert encode_prompt("abc", tokenizer) == [7, 3]
    assert prepare_dataset([{"prompt": "abc", "answer_ids": [5]}], tokenizer, 9)[0]["input_ids"] == [7, 3, 5]
    with pytest.raises(ValueError, match="need a fast tokenizer .* got Own: load a fast one"):
        prepare_dataset([{"messages": [{"role": "user", "content": "a"}]}], tokenizer, 9)


def test_nulls_that_arrow_adds_to_tools_are_not_rendered(tmp_path):
    template = "{{ tools }}{% for m in messages %}{{ m.content }}{{ m.tool_calls }}{% endfor %}"
    tokenizer = byte_tokenizer(template)
    tools = [
        {"type": "function", "function": {"name": "f", "parameters": {"a": {"type": "string"}}}},
        {"type": "function", "function": {"name": "g", "parameters": {"b": {"type": "array"}}}},
    ]
    calls = [[{"name": "f", "arguments": {"a": "x"}}], [{"name": "g", "arguments": {"b": "y"}}]]
    said = [("user", "q"), ("assistant", "c"), ("user", "r"), ("assistant", "a")]
    rows = []
    for tool, call in zip(tools, calls, strict=True):
        messages = [{"role": role, "content": content, "tool_calls": None} for role, content in said]
        messages[1]["tool_calls"] = call
        rows.append({"messages": messages, "tools": [tool], "answer_ids": [[1]]})
    schema = pa.Table.from_pylist(rows).schema  # of structs, each with the entries of both rows
    Dataset(pa.Table.from_pylist(rows, schema=schema)).to_parquet(tmp_path / "rows.parquet")
    prepared = prepare_dataset(tmp_path / "rows.parquet", tokenizer, 9999)
    for row, tool, call in zip(prepared, tools, calls, strict=True):
        assert tokenizer.decode(row["input_ids"][:-1]) == f"{[tool]}qc{call}r"


def test_a_date_in_a_template_does_not_follow_the_clock():
    template = "{% set today = strftime_now('%d %b %Y') if strftime_now is defined %}{{ today }}" + PLAIN_TEMPLATE
    tokenizer = byte_tokenizer(template)
    prepared = prepare_dataset([{"messages": [USER, ANSWER]}], tokenizer, 100)[0]["input_ids"]
    for ids in (prepared, encode_prompt("a", tokenizer)):
        assert tokenizer.decode(ids).startswith(TEMPLATE_DATE.strftime("%d %b %Y") + "<|im_start|>user")


def test_other_forms_of_a_conversation():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": ""}]
    expected = prepare_dataset([{"messages": [USER, ANSWER]}], byte_tokenizer(), 100)[0]
    for row in (
        {"prompt": "a", "completion": "b"},
        {"prompt": [USER], "completion": [ANSWER]},
        {"messages": [{"role": "user", "content": parts}, ANSWER]},
    ):
        assert prepare_dataset([row], byte_tokenizer(), 100)[0] == expected


def test_a_row_that_another_process_refuses_is_told_like_any_other():
    rows = Dataset.from_list(rows_of_prompts(["a", "b"]) + [{"prompt": "c", "answer_ids": [999_999]}])
    with pytest.raises(ValueError, match="Row 2: answer_ids span 999999") as caught:
        prepare_dataset(rows, byte_tokenizer(), 100, num_proc=2)
    assert caught.traceback[-1].path.name == "dataset.py"  # the command line tells what this package raises
