"""Prompt sets from local files: forms of rows, overlap with evaluation questions, drawing, provenance."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_confu.common.jsonl import read_jsonl
from transformers_confu.data import prompts
from transformers_confu.data.prompts import (
    OVERLAP_WORDS,
    SETS,
    SOURCES,
    EvaluationOverlap,
    PromptSource,
    build_prompts,
    find_sources,
    user_turns,
)


NOTHING = EvaluationOverlap([])


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]}, ["a"]),
        (
            {"messages": [{"role": r, "content": r + c} for c in "12" for r in ("user", "assistant")]},
            ["user1", "user2"],
        ),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, ["a"]),
        ({"conversations": [{"from": "gpt", "value": "b"}, {"from": "human", "value": "a"}]}, []),
        ({"conversations": []}, []),
        ({"prompt": [{"role": "user", "content": "a"}]}, ["a"]),
        ({"turns": ["a", "b"]}, ["a", "b"]),
        ({"turns": [{"content": "a"}]}, ["a"]),
        ({"prompt": "a", "messages": None}, ["a"]),
        ({"question": "a", "answer": "b"}, ["a"]),
        ({"instruction": "a", "input": "b"}, ["a\n\nb"]),
        ({"instruction": "a", "instances": [{"input": "b", "output": "c"}]}, ["a\n\nb"]),
        ({"text": "a"}, []),
    ],
)
def test_user_turns_of_every_form(row, turns):
    assert user_turns(row) == turns


# A row of each source whose form is its own, as its publisher documents it.
@pytest.mark.parametrize(
    ("source", "row", "turns"),
    [
        ("oasst2", {"text": "a", "role": "prompter", "parent_id": None, "lang": "en"}, ["a"]),
        ("oasst2", {"text": "a", "role": "prompter", "parent_id": "x", "lang": "en"}, []),
        ("aqua-dev", {"question": "a", "options": ["A)1", "B)2"]}, ["a\nOptions:\nA)1\nB)2"]),
        ("scitldr-train", {"source": ["a.", "b."]}, ["Summarize this abstract in one or two sentences:\n\na. b."]),
    ],
)
def test_sources_with_forms_of_their_own(source, row, turns):
    assert SOURCES[source].turns(row) == turns


def test_sets_name_sources_with_licence_and_credit():
    assert SETS["paper"] == ["sharegpt", "ultrachat-200k"]
    assert sorted(name for names in SETS.values() for name in names) == sorted(SOURCES)
    for source in SOURCES.values():
        assert source.license and "https://" in source.credit
    for source in find_sources(["open"]):
        assert not source.license.startswith(("CC-BY-SA", "CC-BY-NC"))
    assert [source.name for source in find_sources(["gsm8k-train", "folder/mine.jsonl"])] == ["gsm8k-train", "mine"]


WORDS = st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=30)


@settings(max_examples=100, deadline=None)
@given(questions=st.lists(WORDS, max_size=3), text=WORDS)
def test_overlap_is_the_naive_one(questions, text):
    def overlaps(question):
        if len(question) < 5:
            return question == text
        length = min(len(question), OVERLAP_WORDS)
        return any(
            question[first : first + length] == text[at : at + length]
            for first in range(len(question) - length + 1)
            for at in range(len(text) - length + 1)
        )

    overlap = EvaluationOverlap(" ".join(question) for question in questions)
    assert (" ".join(text) in overlap) == any(overlaps(question) for question in questions)
    assert "Tell me: who wrote FAUST\nthe_play" in EvaluationOverlap(["Who wrote “Faust”, the play?"])  # words alone


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PromptSource(path.stem, str(path), "MIT", "someone, https://example.org")


def test_rows_are_kept_cut_and_dropped(tmp_path):
    rows = [
        {"prompt": "  What is a good first question?  "},
        {"turns": ["Say something about cats.", "Now about dogs.", "", "And birds."]},
        {"turns": ["Say something about ants.", "Now about bees.", "Wasps?", "Flies?", "Gnats?"]},
        {"turns": ["A short beginning here", "x" * 6001, "And then?"]},
        {"prompt": "what is a GOOD first question"},
        {"prompt": "too short"},
        {"prompt": "y" * 6001},
        {"turns": ["Something else entirely.", "Name the capital of France, please, now."]},
        {"text": "no prompt at all"},
        {"prompt": "Rows may state their origin.", "source": "elsewhere", "license": "CC0-1.0"},
    ]
    overlap = EvaluationOverlap(["the capital of France, please"])
    taken, report = build_prompts([write(tmp_path / "mine.jsonl", rows)], overlap)
    here = {"source": "mine", "license": "MIT"}
    there = {"source": "elsewhere", "license": "CC0-1.0"}
    assert sorted(taken, key=lambda row: row["id"]) == [
        {"id": "mine-000000", **here, "prompt": "What is a good first question?"},
        {"id": "mine-000001", **here, "turns": ["Say something about cats.", "Now about dogs."]},
        {"id": "mine-000002", **here, "turns": ["Say something about ants.", "Now about bees.", "Wasps?", "Flies?"]},
        {"id": "mine-000003", **here, "prompt": "A short beginning here"},
        {"id": "mine-000009", **there, "prompt": "Rows may state their origin."},
    ]
    assert report.kept == {"mine": 4, "elsewhere": 1}
    reasons = ("there already", "too short", "too long", "in an evaluation set", "no prompt")
    assert report.dropped["mine"] == dict.fromkeys(reasons, 1)
    assert "| elsewhere | CC0-1.0 | someone, https://example.org | 1 |  |" in str(report)


def test_drawing_is_bounded_and_repeats(tmp_path):
    sources = [
        write(tmp_path / f"{name}.jsonl", [{"prompt": f"Question {index} of {name}"} for index in range(number)])
        for name, number in (("few", 10), ("many", 200))
    ]
    rows, report = build_prompts(sources, NOTHING, max_prompts=40, seed=1)
    again, _ = build_prompts(sources, NOTHING, max_prompts=40, seed=1)
    other, _ = build_prompts(sources, NOTHING, max_prompts=40, seed=2)
    assert rows == again != other
    assert len(rows) == 40 == report.kept.total() and 0 < report.kept["few"] <= 10
    assert report.dropped["many"] == {"not drawn": 200 - report.kept["many"]}
    assert [row["id"] for row in rows] != sorted(row["id"] for row in rows)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": '[{"role": "user"}]'}, r"'messages' is .* expected a list of messages"),
        ({"turns": [3]}, "'turns' holds the content 3, expected text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, ".*expected parts of type 'text' only"),
    ],
)
def test_rows_of_a_wrong_kind_are_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=rf"Row 0 of .*mine\.jsonl: {message}"):
        build_prompts([write(tmp_path / "mine.jsonl", [row])], NOTHING)


def test_command_line(tmp_path):
    write(tmp_path / "mine.jsonl", [{"prompt": f"Question number {index}"} for index in range(5)])
    write(tmp_path / "theirs.jsonl", [{"question_id": 1, "turns": ["Question number 3", "And then?"]}])
    argv = ["--sources", tmp_path / "mine.jsonl", "--evaluation", tmp_path / "theirs.jsonl"]
    prompts.main([str(part) for part in [*argv, "--output", tmp_path / "out" / "prompts.jsonl"]])
    assert len(list(read_jsonl(tmp_path / "out" / "prompts.jsonl"))) == 4
    provenance = (tmp_path / "out" / "prompts.md").read_text()
    assert "4 prompts, seed 0." in provenance and "in an evaluation set 1" in provenance
    assert f"- {tmp_path / 'theirs.jsonl'}" in provenance
    with pytest.raises(ValueError, match=r"expected a \.jsonl file"):
        prompts.main(["--output", "prompts.json"])
