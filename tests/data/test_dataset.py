"""Rows to labelled ids, against references written out by hand."""

import gzip
import json
import threading
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import groupby

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from helpers import make_tiny_target
from transformers_confu.data import dataset as data
from transformers_confu.data.dataset import (
    DatasetReport,
    encode_prompt,
    load_jsonl,
    load_rows,
    prepare_dataset,
    sequence_lengths,
)
from transformers_confu.training.train import DraftArguments, prepare


PLAIN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def marked_template(before: str, after: str) -> str:
    """A template whose generation block holds the content and `before`; `after` follows the block."""
    return (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] }}" + before + "{% endgeneration %}" + after + "{% else %}{{ m['content'] }}<|im_end|>\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


TEMPLATES = {
    "plain": PLAIN_TEMPLATE,
    "marked, newline inside": marked_template("<|im_end|>\n", ""),
    "marked, spaces inside": marked_template("<|im_end|>  ", "\n"),
    "marked, newline outside": marked_template("<|im_end|>", "\n"),
    "marked, end of turn outside": marked_template("", "<|im_end|>\n"),
}


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
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
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


def test_given_end_of_turn_ids_extend_a_span():
    tokenizer = byte_tokenizer(marked_template("", "<|im_start|>\n"))
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    end = tokenizer.convert_tokens_to_ids("<|im_start|>")
    for eos_token_ids, expected in ((None, "b"), ([end], "b<|im_start|>")):
        row = prepare_dataset([{"messages": messages}], tokenizer, 100, eos_token_ids=eos_token_ids)[0]
        assert labelled_texts(tokenizer, row) == [expected]


def test_the_command_reads_turns_that_end_as_the_target_ends_them(tmp_path):
    tokenizer = byte_tokenizer(marked_template("", "<|im_start|>\n"))
    target = make_tiny_target(vocab_size=len(tokenizer))
    target.generation_config.eos_token_id = [3, tokenizer.convert_tokens_to_ids("<|im_start|>")]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "data.jsonl").write_text(json.dumps({"messages": messages}))
    arguments = DraftArguments(target="", data=[str(tmp_path / "data.jsonl")], eval_rows=0)
    dataset, _ = prepare(arguments, target, tokenizer)
    assert labelled_texts(tokenizer, dataset[0]) == ["b<|im_start|>"]


def test_answer_ids_are_kept_as_they_are():
    tokenizer = byte_tokenizer()
    answer = [5, 4, 200, 9]  # no text any tokenizer would write this way
    rows = [
        {"prompt": "hé", "answer_ids": answer},
        {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "answer_ids": answer},
    ]
    dataset = prepare_dataset(rows, tokenizer, 1000)
    texts = [
        "<|im_start|>user\nhé<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n",
    ]
    for row, text, given_row in zip(dataset, texts, rows, strict=True):
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert encode_prompt(given_row["prompt"], tokenizer) == prompt
        assert row["input_ids"] == prompt + answer
        assert row["labels"] == [-100] * len(prompt) + answer


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
        rows_in=6,
        rows_kept=3,
        dropped={"no assistant token in the first 4": 1, "no assistant token": 2},
        answers_truncated=1,
        tokens=11,
        assistant_tokens=6,
    )
    for part in ("3 kept of 6", "no assistant token: 2", "wrote 6"):
        assert part in str(report)


def test_many_rows_keep_their_order_and_prepared_rows_pass_through():
    rows = [{"input_ids": [1, index % 200], "labels": [-100, index % 200]} for index in range(2500)]
    dataset = prepare_dataset(iter(rows), byte_tokenizer(), 8)
    assert dataset.to_list() == rows
    assert prepare_dataset(dataset, byte_tokenizer(), 8).to_list() == rows


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, r"Row 0: it has the fields \['text'\], expected 'messages'"),
        ({"prompt": "hello"}, "a prompt without 'answer_ids': .* answer the prompts first"),
        ({"turns": ["hello"]}, "a prompt without 'answer_ids': .* answer the prompts first"),
        ({"conversations": [{"from": "human", "value": "hello"}]}, "ShareGPT's form"),
        ({"messages": "hello"}, "expected a non-empty list of messages"),
        ({"messages": [{"content": "hello"}]}, "expected a message with a role"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "first message is the assistant's"),
        ({"prompt": 3, "answer_ids": [1]}, "'prompt' is 3"),
        ({"prompt": "a", "answer_ids": [999_999]}, "another tokenizer"),
        ({"prompt": "a", "answer_ids": [1.5]}, "not integers"),
        ({"input_ids": [1, 2], "labels": [2]}, "2 input_ids and 1 labels"),
        ({"input_ids": [1, 2], "labels": [2, -100]}, "labels are not shifted"),
        ({"input_ids": [1, -2], "labels": [-100, -2]}, "expected ids from 0"),
    ],
)
def test_malformed_rows_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        prepare_dataset([row], byte_tokenizer(), 100)


# Like Qwen3's: reasoning of earlier turns is dropped, the newest answer always has some.
REASONING_TEMPLATE = (
    "{% if tools %}<tools>{{ tools | length }}</tools>{% endif %}"
    "{% for m in messages %}{% set text = m['content'].split('</think>')[-1] %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] != 'assistant' or not loop.last %}{{ text }}"
    "{% elif '</think>' in m['content'] %}{{ m['content'] }}{% else %}<think></think>{{ text }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)


@pytest.mark.parametrize("marked", [False, True])
def test_answers_of_a_template_that_rewrites_history_become_rows_of_their_own(marked):
    template = REASONING_TEMPLATE
    if marked:
        template = template.replace(
            "\n{% if m['role'] != 'assistant'", "\n{%+ generation %}{% if m['role'] != 'assistant'"
        )
        template = template.replace("<|im_end|>\n{% endfor", "<|im_end|>{% endgeneration %}{{ '\\n' }}{% endfor")
        # Markers around users' turns too, so that only the newest span may count.
    tokenizer = byte_tokenizer(template)
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
    assert (report.rows_in, report.rows_split_off, report.rows_kept) == (1, 1, 2)
    assert "2 kept of 2" in str(report) and "rows of their own: 1" in str(report)


def turn_rows(tokenizer, name, said):
    """Answered rows of a conversation, as the target answers it turn by turn."""
    rows, messages = [], []
    for turn, (question, answer) in enumerate(said):
        messages = [*messages, {"role": "user", "content": question}]
        ids = tokenizer(answer + "<|im_end|>", add_special_tokens=False)["input_ids"]
        rows.append({"id": f"{name}/{turn}", "prompt": messages, "answer_ids": ids})
        messages = [*messages, {"role": "assistant", "content": answer}]
    return rows


def test_prepared_rows_may_carry_what_they_were_made_of():
    row = {"id": "c/0", "input_ids": [3, 4, 5], "labels": [-100, 4, 5], "answer_ids": [4, 5]}
    assert prepare_dataset([row], byte_tokenizer(), 10)["input_ids"] == [[3, 4, 5]]


def test_turns_of_a_conversation_become_one_row_where_they_go_on_from_each_other():
    tokenizer = byte_tokenizer()
    a = turn_rows(tokenizer, "a", [("q", "one"), ("r", "two"), ("s", "three")])
    b = turn_rows(tokenizer, "b", [("q", "x"), ("r", "y")])
    b[0]["answer_ids"] = b[0]["answer_ids"][:-1]  # was cut
    other = {"id": "c/0", "prompt": "a string", "answer_ids": [1]}
    report = DatasetReport()
    rows = prepare_dataset([a[0], b[0], a[1], other, b[1], a[2]], tokenizer, 1000, report=report)
    assert [labelled_texts(tokenizer, row) for row in rows] == [
        [tokenizer.decode([1])],
        ["x", "y<|im_end|>"],
        ["one<|im_end|>", "two<|im_end|>", "three<|im_end|>"],
    ]
    messages = [*a[2]["prompt"], {"role": "assistant", "content": "three"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(rows[2]["input_ids"]) == text.rstrip("\n")
    assert (report.rows_in, report.rows_merged, report.rows_kept) == (6, 3, 3)
    assert "3 kept of 3" in str(report) and "part of the row of the next: 3" in str(report)

    # A template that drops earlier reasoning: every turn as the target saw it.
    tokenizer = byte_tokenizer(REASONING_TEMPLATE)
    turns = turn_rows(tokenizer, "a", [("q", "<think>1</think>one"), ("r", "<think>2</think>two")])
    report = DatasetReport()
    rows = prepare_dataset(turns, tokenizer, 1000, report=report)
    assert [labelled_texts(tokenizer, row) for row in rows] == [
        ["<think>1</think>one<|im_end|>"],
        ["<think>2</think>two<|im_end|>"],
    ]
    assert report.rows_merged == 0


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
        {"prompt": "q", "answer_ids": ids, "tools": json.dumps(tools), "chat_template_kwargs": off},
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


def test_a_generation_prompt_that_no_answer_follows_is_refused():
    template = PLAIN_TEMPLATE.replace("assistant\n{% endif", "assistant\n<hint>{% endif")
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(ValueError, match=r"behind messages 0 to 0 is not .* before message 1.* generation"):
        prepare_dataset([{"messages": messages}], byte_tokenizer(template), 100)


def test_a_template_that_refuses_the_messages_is_named():
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"Row 0: .*refuses the messages: roles must alternate"):
        prepare_dataset([{"prompt": "a", "answer_ids": [1]}], byte_tokenizer(template), 100)


def test_a_missing_template_is_named():
    with pytest.raises(ValueError, match="chat_template"):
        prepare_dataset([{"prompt": "a", "answer_ids": [1]}], byte_tokenizer(None), 100)


def test_nothing_left_is_an_error():
    with pytest.raises(ValueError, match=r"None of 1 rows .*no assistant token in the first 3: 1"):
        prepare_dataset([{"prompt": "a", "answer_ids": [1]}], byte_tokenizer(), 3)
    with pytest.raises(ValueError, match="no row was given"):
        prepare_dataset([], byte_tokenizer(), 3)
    with pytest.raises(ValueError, match="max_length is 1"):
        prepare_dataset([], byte_tokenizer(), 1)


def test_load_jsonl(tmp_path):
    rows = [{"a": "é\u2028"}, {"b": [1, 2]}]
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    assert load_jsonl(tmp_path / "a.jsonl") == rows
    assert load_jsonl(str(tmp_path / "a.jsonl.gz")) == rows

    for content, message in (
        (b'{"a": 1}\n{"b": \n', r"bad\.jsonl, line 2 is not JSON"),
        (b'{"a": 1}\n[1]\n', r"bad\.jsonl, line 2 holds a list"),
        (b'\n"\xff"\n', r"bad\.jsonl, line 2 is not JSON"),
    ):
        (tmp_path / "bad.jsonl").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_jsonl(tmp_path / "bad.jsonl")
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(text.encode())[:-10])
    with pytest.raises(ValueError, match=r"torn\.jsonl\.gz cannot be decompressed"):
        load_jsonl(tmp_path / "torn.jsonl.gz")


def test_load_rows(tmp_path):
    rows = [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(lines)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "rows.csv").write_text("prompt,n\na,1\nb,2\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "rows.jsonl").write_text(lines)
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    (tmp_path / "lines.json").write_text(lines)
    for name in ("rows.jsonl", "rows.json", "lines.json", "rows.csv", "folder", "saved"):
        assert list(load_rows(tmp_path / name)) == rows, name
        assert list(load_rows(str(tmp_path / name))) == rows
    (tmp_path / "rows.xyz").write_text("?")
    (tmp_path / "list.json").write_text("[1]")
    for name, message in (
        ("none.jsonl", r"There is no file, folder, address or Hub dataset .*none\.jsonl"),
        ("rows.xyz", r"rows\.xyz cannot be read as a file, folder, address or Hub dataset"),
        ("list.json", r"list\.json cannot be read .* list of other things"),
    ):
        with pytest.raises(ValueError, match=message):
            load_rows(tmp_path / name)


def test_load_rows_from_an_address(tmp_path):
    rows = [{"prompt": "a\u2028b"}, {"prompt": "b"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            address = f"http://127.0.0.1:{server.server_port}"
            assert load_rows(f"{address}/rows.jsonl") == rows
            with pytest.raises(ValueError, match=r"There is no .*none\.jsonl"):
                load_rows(f"{address}/none.jsonl")
        finally:
            server.shutdown()
            thread.join(timeout=10)
    with pytest.raises(ValueError, match=r"rows\.jsonl, or it is out of reach: Cannot connect"):
        load_rows(f"{address}/rows.jsonl")


def test_load_rows_asks_the_hub_for_name_configuration_and_split(monkeypatch):
    asked = []
    monkeypatch.setattr(data, "load_dataset", lambda *args, **kwargs: asked.append((*args, kwargs["split"])) or [])
    for source in ("org/name", "org/name:test", "org/name:main:test"):
        load_rows(source)
    assert asked == [("org/name", "train"), ("org/name", "test"), ("org/name", "main", "test")]

    def unreachable(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr(data, "load_dataset", unreachable)
    with pytest.raises(ValueError, match=r"org/name cannot be read .*: offline"):
        load_rows("org/name")
