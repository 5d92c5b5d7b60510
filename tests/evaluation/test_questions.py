"""Files of questions: what is read, how questions are chosen, and what is refused."""

import json
import re
from unittest import mock

import pytest

from transformers_confu.common.spec_bench import SPEC_BENCH_URL
from transformers_confu.evaluation.questions import Question, fetch, load_questions, stratified


def write(tmp_path, rows, name="questions.jsonl"):
    path = tmp_path / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_spec_bench_rows_and_plain_prompts(tmp_path):
    rows = [
        {"question_id": 81, "category": "writing", "turns": ["one", "two"], "reference": ["unused"]},
        {"question_id": 241, "category": "translation", "turns": ["three"]},
    ]
    assert load_questions(write(tmp_path, rows)) == [
        Question("81", "writing", ("one", "two")),
        Question("241", "translation", ("three",)),
    ]
    assert [question.group for question in load_questions(write(tmp_path, rows))] == ["mt_bench", "translation"]
    prompts = [{"prompt": "a"}, {"prompt": "b", "id": "x", "category": "mine"}]
    assert load_questions(write(tmp_path, prompts)) == [
        Question("1", "prompts", ("a",)),
        Question("x", "mine", ("b",)),
    ]
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbffirst\n\nsecond\n")  # with a byte-order mark
    assert [(question.id, question.turns) for question in load_questions(path)] == [
        ("1", ("first",)),
        ("2", ("second",)),
    ]


ONE = {"question_id": 1, "category": "qa", "turns": ["a"]}


@pytest.mark.parametrize(
    "rows, message",
    [
        ("Grüße", r"prompts.txt is not UTF-8 \(.*\); save it as such."),
        (None, "There is no file .*nowhere.jsonl; give a JSONL file"),
        ([], "holds no question"),
        ([ONE, "{"], "line 2 is not JSON"),
        ([ONE, ONE], "holds question 1 twice; make the ids unique"),
        ([{"turns": ["a"]}], r"question 1 has the fields \['turns'\]; expected `question_id`, `category` and `turns`"),
        ([ONE | {"turns": []}], r"question 1 \(id 1\) has the turns \[\]; expected one or more texts"),
        ([ONE | {"turns": ["a", " "]}], "has the turns .*; expected one or more texts"),
        ([{"prompt": None}], "has the turns .None.; expected one or more texts"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(tmp_path, rows, message):
    path = tmp_path / ("prompts.txt" if isinstance(rows, str) else "nowhere.jsonl")
    if isinstance(rows, str):
        path.write_bytes(rows.encode("latin-1"))
    elif rows is not None:
        path = write(tmp_path, rows)
    with pytest.raises(ValueError, match=message):
        load_questions(path)


def test_every_group_gives_as_many_and_its_categories_take_turns():
    categories = ["writing"] * 3 + ["math"] * 3 + ["stem"] * 2 + ["qa"] * 5
    questions = [Question(str(number), category, ("a",)) for number, category in enumerate(categories)]
    chosen = stratified(questions, 4)
    # Of MT-bench the first of each category, then the second of the first; in the file's order.
    assert [question.id for question in chosen] == ["0", "1", "3", "6", "8", "9", "10", "11"]
    assert stratified(questions, None) == questions
    with pytest.raises(ValueError, match="Group qa holds 5 questions, `num_per_group` asks for 6; lower it"):
        stratified(questions, 6)


def test_urls_are_downloaded_and_a_failure_says_what_to_do(tmp_path):
    assert re.search("/Spec-Bench/[0-9a-f]{40}/", SPEC_BENCH_URL)  # one commit, whatever its authors change
    path = write(tmp_path, [ONE])
    assert fetch(str(path)) == path
    way = "datasets.DownloadManager.download_and_extract"
    with mock.patch(way, return_value=str(path)) as download:
        assert fetch(None) == path
        assert fetch("hf://datasets/org/name/questions.jsonl") == path
    assert [call.args[0] for call in download.call_args_list] == [
        SPEC_BENCH_URL,
        "hf://datasets/org/name/questions.jsonl",
    ]
    copy = write(tmp_path, ["first", "second"], "0123abcd")  # is named by a hash
    with mock.patch(way, return_value=str(copy)):
        assert [question.turns for question in load_questions("https://host/prompts.txt")] == [("first",), ("second",)]
        with pytest.raises(ValueError, match="line 1 is not JSON"):
            load_questions("https://host/prompts.jsonl")
    with mock.patch(way, side_effect=ConnectionError("offline")):
        with pytest.raises(ValueError, match=r"could not be fetched from https.* \(ConnectionError\); download"):
            fetch(None)
