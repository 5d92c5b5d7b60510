"""Batched answers against one-by-one `generate`, and interrupted runs against whole ones."""

import copy
import json

import pytest
import torch

from helpers import make_tiny_target
from transformers_confu.common.jsonl import JsonLines, read_jsonl
from transformers_confu.data import regeneration
from transformers_confu.data.chat_template import encode_prompt
from transformers_confu.data.dataset import prepare_dataset
from transformers_confu.data.fingerprints import fingerprint_of_target
from transformers_confu.data.regeneration import regenerate


ENDS = (1, 9, 11)
SETTINGS = {"max_new_tokens": 12, "batch_size": 3, "max_prompt_length": 12, "temperatures": (0.0, 0.8), "seed": 5}


def rows_of(path) -> dict:
    return {row["id"]: row for row in read_jsonl(path)}


def expected_row(target, tokenizer, prompt, settings) -> dict:
    """The messages, ids and end of what plain `generate` answers to one row of prompts alone."""
    messages = [{"role": "system", "content": prompt["system"]}] if "system" in prompt else []
    row = {"messages": messages, "prompt_ids": [], "answer_ids": [], "finished": True}
    for turn in prompt.get("turns", [prompt.get("prompt")]):
        said = [{"role": "user", "content": turn}] if isinstance(turn, str) else turn
        ids = encode_prompt(messages + said, tokenizer)
        if len(ids) > settings["max_prompt_length"]:
            break
        length = settings["max_new_tokens"]
        answer = target.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=length, pad_token_id=1)
        answer = answer[0, len(ids) :].tolist()
        row["finished"] = answer[-1] in ENDS
        text = tokenizer.decode(answer[:-1] if row["finished"] else answer)
        messages += [*said, {"role": "assistant", "content": text}]
        row["prompt_ids"].append(ids)
        row["answer_ids"].append(answer)
        if not (row["finished"] and text):
            break
    return row


def test_greedy_answers_are_those_of_single_row_generate(target, tokenizer, prompts, tmp_path):
    prompts[0] |= {"source": "mine", "license": "MIT"}
    prompts += [
        {"id": "a", "turns": ["w1 w2", "w3", "w4"], "system": "w9"},
        *({"id": index, "turns": [f"w{index}", "w5"]} for index in range(20)),
        *({"id": f"b{index}", "turns": [f"w{index}", "w6 " * 25, "w7"]} for index in range(10)),
    ]
    # Batches are of one temperature: at 100 nothing is left of greedy answers.
    settings = SETTINGS | {"temperatures": (0.0, 100.0), "max_prompt_length": 30, "max_new_tokens": 8}
    report = regenerate(target, tokenizer, prompts, tmp_path / "a.jsonl", **settings)
    rows = rows_of(tmp_path / "a.jsonl")
    assert rows.keys() == {prompt["id"] for prompt in prompts} - {"long"}
    made_with = {
        "target_name": "tiny",
        "target": fingerprint_of_target(target, torch.bfloat16),
        "generation": {"bos_token_id": 0, "eos_token_id": [1, 9, 11], "suppress_tokens": [0, 2, 3, 4, 5]},
        "max_new_tokens": 8,
        "seed": 5,
    }
    greedy, turns = [], {prompt["id"]: len(prompt.get("turns", "1")) for prompt in prompts}
    for number, prompt in enumerate(prompts):
        if prompt["id"] == "long":
            continue
        row, expected = rows[prompt["id"]], expected_row(target, tokenizer, prompt, settings)
        assert row["temperature"] == settings["temperatures"][number % 2] and row["made_with"] == made_with
        assert {name: row.get(name) for name in ("source", "license")} == {
            name: prompt.get(name) for name in ("source", "license")
        }
        if row["temperature"] == 0:
            greedy.append(row)
            assert {name: row[name] for name in expected} == expected
        else:
            assert row["answer_ids"] != expected["answer_ids"]
    assert {row["finished"] for row in greedy} == {True, False}
    assert {len(row["answer_ids"]) for row in greedy} >= {1, 2}
    assert (report.prompts, report.too_long, report.resumed, report.written) == (52, 1, 0, 51)
    assert report.unfinished == sum(not row["finished"] for row in rows.values())
    assert report.stopped == sum(len(row["answer_ids"]) < turns[row["id"]] for row in rows.values())
    assert report.tokens == sum(len(ids) for row in rows.values() for ids in row["answer_ids"])
    dataset = prepare_dataset(tmp_path / "a.jsonl", tokenizer, 200)
    learned = sorted(label for row in dataset for label in row["labels"] if label != -100)
    assert learned == sorted(token for row in rows.values() for ids in row["answer_ids"] for token in ids)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(("batches_before", "torn"), [(0, b'{"id": "p'), (3, b'{"id": "p3"}')])
def test_interrupted_and_resumed_equals_uninterrupted(
    target, tokenizer, prompts, tmp_path, monkeypatch, batches_before, torn
):
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    regenerate(target, tokenizer, prompts, whole, **SETTINGS)
    appended = []

    def stops(self, rows):
        if len(appended) == batches_before:
            raise Interrupted
        appended.append(1)
        append(self, rows)

    append = JsonLines.append
    with monkeypatch.context() as patch:
        patch.setattr(JsonLines, "append", stops)
        with pytest.raises(Interrupted):
            regenerate(target, tokenizer, prompts, parts, **SETTINGS)
    lines = parts.read_bytes().splitlines(keepends=True) if batches_before else []
    assert len(lines) == 3 * batches_before
    parts.write_bytes(b"".join(lines) + torn)
    torch.manual_seed(99)  # the state of the process must not matter
    report = regenerate(target, tokenizer, prompts, parts, **SETTINGS)
    assert parts.read_bytes() == whole.read_bytes()
    assert (report.resumed, report.written) == (3 * batches_before, 20 - 3 * batches_before)

    # Of a batch that was not written whole, the rest is answered.
    parts.write_bytes(b"".join(whole.read_bytes().splitlines(keepends=True)[:4]))
    assert regenerate(target, tokenizer, prompts, parts, **SETTINGS).written == 16
    assert rows_of(parts).keys() == rows_of(whole).keys()


def test_sampling_follows_the_seed_and_leaves_the_random_state(target, tokenizer, prompts, tmp_path):
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    rows = {}
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        regenerate(target, tokenizer, prompts, tmp_path / f"{name}.jsonl", **SETTINGS | {"seed": seed})
        rows[name] = rows_of(tmp_path / f"{name}.jsonl")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert rows["a"] == rows["b"]
    answers = {name: {key: row["answer_ids"] for key, row in rows[name].items()} for name in rows}
    assert answers["a"] != answers["c"]
    # Prompts take the temperatures in turn.
    assert [rows["a"][prompt["id"]]["temperature"] for prompt in prompts[3:]] == [0.8, 0.0] * 9
    for key, row in rows["a"].items():
        assert row["temperature"] > 0 or answers["a"][key] == answers["c"][key]


def test_answers_of_another_run_are_refused(target, tokenizer, prompts, tmp_path):
    path = tmp_path / "a.jsonl"
    regenerate(target, tokenizer, prompts, path, **SETTINGS)
    written = path.read_bytes()
    lines = written.splitlines(keepends=True)
    other, sampled = copy.deepcopy(target), copy.deepcopy(target)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    sampled.generation_config.top_p = 0.9
    no_answer = r"line \d+ is no answer .* this call would write"
    for content, model, asked, changed, message in (
        (written, target, prompts, {"temperatures": (0.8, 0.0)}, no_answer),
        (written, target, [{**prompts[0], "prompt": "w9"}, *prompts[1:]], {}, no_answer),
        (written, target, prompts, {"max_new_tokens": 9}, r"line 1 .* settings \(max_new_tokens was 12, is 9\)"),
        (lines[0], other, prompts, {}, r"line 1 was made with other settings \(target was '\w+', is '\w+'\)"),
        (lines[0], sampled, prompts, {}, r"settings \(generation was \{.*\}, is \{.*'top_p': 0.9.*\}\)"),
        (b"{broken\n" + written, target, prompts, {}, "line 1 is not JSON"),
        (b'{"id": 1}\n{"id": 2}', target, prompts, {}, "line 1 is no answer"),  # its last line is not torn
        (written + lines[0], target, prompts, {}, r"line 21 is no answer"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            regenerate(model, tokenizer, asked, path, **SETTINGS | changed)
        assert path.read_bytes() == content
    # What every call says for itself does not count, whatever the target's own is; nor does the target's name.
    path.write_bytes(written)
    target.generation_config.temperature = 0.3
    target.config.name_or_path = "elsewhere"
    assert regenerate(target, tokenizer, prompts, path, **SETTINGS).resumed == 20


def test_reasoning_marks_that_are_special_tokens_stay_in_the_history(target, tokenizer, tmp_path, monkeypatch):
    """The template cuts earlier reasoning by its marks: dropped with the special tokens, they would leave it in."""
    tokenizer.add_special_tokens({"extra_special_tokens": ["w20", "w21"]})  # as <think> and </think>
    tokenizer.chat_template = tokenizer.chat_template.replace("m['content'] }}", "m['content'].split('w21')[-1] }}")
    said = tokenizer.convert_tokens_to_ids(["w20", "w1", "w4", "w21", "w7", "</s>"])
    monkeypatch.setattr(
        target, "generate", lambda ids, **_: torch.cat([ids, torch.tensor([said]).expand(len(ids), -1)], dim=1)
    )
    rows = [{"id": 0, "turns": ["w5", "w6"]}]
    regenerate(target, tokenizer, rows, tmp_path / "a.jsonl", **SETTINGS | {"max_prompt_length": 40})
    second = next(read_jsonl(tmp_path / "a.jsonl"))["prompt_ids"][1]
    assert tokenizer.decode(second) == "<s> user w5 </s> <s> assistant w7 </s> <s> user w6 </s> <s> assistant"


@pytest.mark.parametrize(
    ("settings", "prompts", "message"),
    [
        ({"batch_size": 0}, [], "batch_size is 0, expected at least 1"),
        ({"temperatures": (-1.0,)}, [], "temperatures is"),
        ({"max_new_tokens": 60}, [], "context has 64"),
        ({}, [{"id": "a"}], "Row 0: it has the fields .* expected 'id' and either"),
        ({}, [{"id": "a", "prompt": "w1", "turns": ["w2"]}], "Row 0: it has the fields .* expected 'id' and either"),
        ({}, [{"id": 1, "prompt": "w1"}, {"id": 1, "prompt": "w2"}], "Row 1 has the id 1 of an earlier"),
        ({}, [{"id": 1, "prompt": 5}], r"Row 0: 'prompt' is 5"),
        ({}, [{"id": 1, "turns": [1]}], "a non-empty list of the user's turns"),
        ({}, [{"id": 1, "prompt": "w1", "tools": 3}], "Prompt 1: 'tools' is 3"),
    ],
)
def test_bad_settings_and_prompts_are_refused(target, tokenizer, tmp_path, settings, prompts, message):
    with pytest.raises(ValueError, match=message):
        regenerate(target, tokenizer, prompts, tmp_path / "a.jsonl", **SETTINGS | settings)
    assert not (tmp_path / "a.jsonl").exists()


def test_targets_and_outputs_that_do_not_serve_are_refused(target, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"expected a \.jsonl file"):
        regenerate(target, tokenizer, [], tmp_path / "a.jsonl.gz", **SETTINGS)
    target.generation_config.stop_strings = ["w3"]
    with pytest.raises(ValueError, match="has stop_strings, .*: unset them"):
        regenerate(target, tokenizer, [], tmp_path / "a.jsonl", **SETTINGS)
    with pytest.raises(ValueError, match=r"call target\.eval\(\)"):
        regenerate(target.train(), tokenizer, [], tmp_path / "a.jsonl", **SETTINGS)


def test_the_hash_of_a_target_as_rounded_is_that_of_the_rounded_target():
    target = make_tiny_target(dtype=torch.float32)
    rounded = copy.deepcopy(target).to(torch.bfloat16)
    hashed = fingerprint_of_target(rounded)
    assert hashed != fingerprint_of_target(target)
    for same in (rounded, target, copy.deepcopy(rounded).float()):
        assert fingerprint_of_target(same, torch.bfloat16) == hashed


def test_command_line(target, tokenizer, prompts, tmp_path, capsys):
    target.save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    output = tmp_path / "out" / "answers.jsonl"
    argv = ["--target", tmp_path / "target", "--prompts", tmp_path / "prompts.jsonl", "--output", output]
    argv += "--dtype float64 --device cpu --seed 5 --temperatures 0.0 0.8".split()
    argv += "--max-new-tokens 12 --batch-size 3 --max_prompt_length 12".split()  # dashes or not
    regeneration.main([str(part) for part in argv])
    assert "answers written: 20" in capsys.readouterr().out
    target.config.name_or_path = "target"  # the folder, without the way to it
    regenerate(target, tokenizer, prompts, tmp_path / "direct.jsonl", **SETTINGS)
    assert output.read_bytes() == (tmp_path / "direct.jsonl").read_bytes()
