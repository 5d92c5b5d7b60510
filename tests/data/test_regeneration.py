"""Batched answers against one-by-one `generate`, and interrupted runs against whole ones."""

import copy
import json
from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from helpers import make_tiny_target
from transformers_confu.common.jsonl import JsonLines, read_jsonl
from transformers_confu.data import regeneration
from transformers_confu.data.chat_template import encode_prompt
from transformers_confu.data.dataset import prepare_dataset
from transformers_confu.data.fingerprints import fingerprint_of_target
from transformers_confu.data.regeneration import regenerate


TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)
WORDS = ["<s>", "</s>", "<unk>", "user", "assistant", *(f"w{index}" for index in range(27))]
SETTINGS = {"max_new_tokens": 12, "batch_size": 3, "max_prompt_length": 12, "temperatures": (0.0, 0.8), "seed": 5}


@pytest.fixture(scope="module")
def target() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config).double().eval()
    model.config.name_or_path = "tiny"
    # A random target hardly ever ends an answer: two ends make both finished and unfinished answers occur.
    model.generation_config.eos_token_id = [1, 7]
    return model


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = TEMPLATE
    return fast


def make_prompts(number: int = 20) -> list[dict]:
    """Prompts of 1 to 6 words; the last one as messages, and one that is too long."""
    prompts = [
        {"id": f"p{index}", "prompt": " ".join(f"w{(index * 5 + word) % 27}" for word in range(1 + index % 6))}
        for index in range(number)
    ]
    prompts[-1]["prompt"] = [{"role": "user", "content": prompts[-1]["prompt"]}]
    prompts.insert(2, {"id": "long", "prompt": "w1 " * 30})
    return prompts


def rows_of(path) -> dict:
    return {row["id"]: row for row in read_jsonl(path)}


def expected_answer(target, tokenizer, prompt, max_new_tokens=12) -> tuple[list[int], list[int]]:
    """The prompt's ids, and what plain `generate` answers to it alone."""
    ids = encode_prompt(prompt, tokenizer)
    answer = target.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=1)
    return ids, answer[0, len(ids) :].tolist()


def test_greedy_rows_equal_single_row_generate(target, tokenizer, tmp_path):
    prompts = make_prompts()
    prompts[0] |= {"source": "mine", "license": "MIT"}
    report = regenerate(target, tokenizer, prompts, tmp_path / "a.jsonl", **{**SETTINGS, "temperatures": (0.0,)})
    rows = rows_of(tmp_path / "a.jsonl")

    assert rows.keys() == {prompt["id"] for prompt in prompts} - {"long"}
    for prompt in prompts:
        if prompt["id"] == "long":
            continue
        asked = prompt["prompt"] if isinstance(prompt["prompt"], str) else prompt["prompt"][0]["content"]
        ids, answer = expected_answer(target, tokenizer, prompt["prompt"])
        finished = answer[-1] in (1, 7)
        assert rows[prompt["id"]] == {
            "id": prompt["id"],
            "messages": [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": tokenizer.decode(answer[:-1] if finished else answer)},
            ],
            "prompt_ids": [ids],
            "answer_ids": [answer],
            "temperature": 0.0,
            "finished": finished,
            "made_with": {
                "target_name": "tiny",
                "target": fingerprint_of_target(target, torch.bfloat16),
                "generation": {"bos_token_id": 0, "eos_token_id": [1, 7]},
                "max_new_tokens": 12,
                "seed": 5,
            },
            **({"source": "mine", "license": "MIT"} if prompt["id"] == "p0" else {}),
        }
    finished = [row["finished"] for row in rows.values()]
    assert any(finished) and not all(finished)
    assert (report.prompts, report.too_long, report.resumed, report.written) == (21, 1, 0, 20)
    assert report.unfinished == finished.count(False)
    assert report.tokens == sum(len(row["answer_ids"][0]) for row in rows.values())
    assert "20" in str(report)


def test_conversations_are_answered_turn_by_turn(target, tokenizer, tmp_path):
    rows = [
        {"id": "a", "turns": ["w1 w2", "w3", "w4"], "system": "w9"},
        *({"id": index, "turns": [f"w{index}", "w5"]} for index in range(20)),
        {"id": "one", "prompt": "w6"},
        {"id": "long", "turns": ["w5", "w6 " * 50, "w7"]},
    ]
    settings = {**SETTINGS, "temperatures": (0.0,), "max_prompt_length": 40, "max_new_tokens": 8}
    report = regenerate(target, tokenizer, rows, tmp_path / "a.jsonl", **settings)
    answered = rows_of(tmp_path / "a.jsonl")
    assert answered.keys() == {row["id"] for row in rows}
    numbers = Counter()
    for row in rows:
        messages = [{"role": "system", "content": row["system"]}] if "system" in row else []
        prompts, answers = [], []
        for turn in row.get("turns", [row.get("prompt")]):
            ids, answer = expected_answer(target, tokenizer, [*messages, {"role": "user", "content": turn}], 8)
            if len(ids) > 40:
                break
            finished = answer[-1] in (1, 7)
            text = tokenizer.decode(answer[:-1] if finished else answer)
            messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": text}]
            prompts.append(ids)
            answers.append(answer)
            if not finished or not text:
                break
        found = answered[row["id"]]
        assert (found["messages"], found["prompt_ids"], found["answer_ids"]) == (messages, prompts, answers)
        assert found["finished"] == finished
        numbers[len(answers)] += 1
    assert numbers[1] and numbers[2]
    assert report.stopped == sum(len(answered[row["id"]]["answer_ids"]) < len(row.get("turns", "1")) for row in rows)
    dataset = prepare_dataset(tmp_path / "a.jsonl", tokenizer, 200)
    learned = sorted(label for row in dataset for label in row["labels"] if label != -100)
    assert learned == sorted(token for row in answered.values() for ids in row["answer_ids"] for token in ids)
    assert regenerate(target, tokenizer, rows, tmp_path / "a.jsonl", **settings).written == 0


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("torn", [b"", b'{"id": "p', b'{"id": "p3", "messages": []}'])
@pytest.mark.parametrize("batches_before", [0, 1, 3])
@pytest.mark.parametrize("lines_cut", [0, 1])
def test_interrupted_and_resumed_equals_uninterrupted(
    target, tokenizer, tmp_path, monkeypatch, batches_before, torn, lines_cut
):
    prompts = make_prompts()
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
    parts.write_bytes(b"".join(lines[: len(lines) - lines_cut]) + torn)  # of a batch that was not written whole
    torch.manual_seed(99)  # the state of the process must not matter
    report = regenerate(target, tokenizer, prompts, parts, **SETTINGS)

    kept = max(0, batches_before - lines_cut) * 3
    assert parts.read_bytes() == whole.read_bytes()
    assert (report.resumed, report.written) == (kept, 20 - kept)
    assert regenerate(target, tokenizer, prompts, parts, **SETTINGS).written == 0
    assert parts.read_bytes() == whole.read_bytes()


def test_draws_follow_the_law_of_the_processed_scores(target, tokenizer, tmp_path):
    """Frequencies of the first token against the softmax that plain `generate` draws from."""
    target = copy.deepcopy(target)
    target.generation_config.top_k = 5
    number = 4000
    prompts = [{"id": index, "prompt": "w3 w4"} for index in range(number)]
    settings = {**SETTINGS, "max_new_tokens": 1, "batch_size": 500, "temperatures": (0.7,)}
    regenerate(target, tokenizer, prompts, tmp_path / "a.jsonl", **settings)
    kept = (target(torch.tensor([encode_prompt("w3 w4", tokenizer)])).logits[0, -1] / 0.7).topk(5)
    expected = torch.zeros(len(WORDS), dtype=torch.float64)
    expected[kept.indices] = kept.values.softmax(-1)
    drawn = torch.tensor([row["answer_ids"][0][0] for row in read_jsonl(tmp_path / "a.jsonl")])
    found = drawn.bincount(minlength=len(WORDS)) / number
    assert found[expected == 0].sum() == 0
    # Five standard deviations of a frequency.
    assert ((found - expected).abs() < 5 * (expected * (1 - expected) / number).sqrt() + 1e-12).all()


def test_sampling_follows_the_seed_and_leaves_the_random_state(target, tokenizer, tmp_path):
    prompts = make_prompts()
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    rows = {}
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        regenerate(target, tokenizer, prompts, tmp_path / f"{name}.jsonl", **{**SETTINGS, "seed": seed})
        rows[name] = rows_of(tmp_path / f"{name}.jsonl")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert rows["a"] == rows["b"]
    answers = {name: {key: row["answer_ids"] for key, row in rows[name].items()} for name in rows}
    assert answers["a"] != answers["c"]
    # Prompts take the temperatures in turn.
    assert [rows["a"][prompt["id"]]["temperature"] for prompt in prompts[3:]] == [0.8, 0.0] * 9
    for key, row in rows["a"].items():
        assert row["temperature"] > 0 or answers["a"][key] == answers["c"][key]


def test_answers_of_another_run_are_refused(target, tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    prompts = make_prompts()
    regenerate(target, tokenizer, prompts, path, **SETTINGS)
    written = path.read_bytes()
    with pytest.raises(ValueError, match=r"line \d+ is no answer .* this call would write"):
        regenerate(target, tokenizer, prompts, path, **{**SETTINGS, "temperatures": (0.8, 0.0)})
    with pytest.raises(ValueError, match=r"line 1 was made with other settings \(max_new_tokens was 12, is 9\)"):
        regenerate(target, tokenizer, prompts, path, **{**SETTINGS, "max_new_tokens": 9})
    for changed in (prompts[:5], [{**prompts[0], "prompt": "w9"}, *prompts[1:]]):
        with pytest.raises(ValueError, match=r"line \d+ is no answer .* this call would write"):
            regenerate(target, tokenizer, changed, path, **SETTINGS)
    for content, message in (
        (b"{broken\n" + written, "line 1 is not JSON"),
        (b'{"id": 1}\n{"id": 2}', "line 1 is no answer"),  # another file, its last line is not torn
        (written + written.splitlines(keepends=True)[0], r"line 21 is no answer"),
        (b"".join(written.splitlines(keepends=True)[::-1]), "in another order than this call writes"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            regenerate(target, tokenizer, prompts, path, **SETTINGS)
        assert path.read_bytes() == content


def test_answers_of_another_seed_or_target_are_refused(target, tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    prompts = make_prompts()
    regenerate(target, tokenizer, prompts, path, **SETTINGS)
    part = b"".join(path.read_bytes().splitlines(keepends=True)[:3])
    path.write_bytes(part)
    with pytest.raises(ValueError, match=r"line 1 was made with other settings \(seed was 5, is 6\): repeat the"):
        regenerate(target, tokenizer, prompts, path, **{**SETTINGS, "seed": 6})
    other = copy.deepcopy(target)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    with pytest.raises(ValueError, match=r"line 1 was made with other settings \(target was '\w+', is '\w+'\)"):
        regenerate(other, tokenizer, prompts, path, **SETTINGS)
    other = copy.deepcopy(target)
    other.generation_config.top_p = 0.9
    with pytest.raises(ValueError, match=r"other settings \(generation was \{.*\}, is \{'top_p': 0.9, .*\}\)"):
        regenerate(other, tokenizer, prompts, path, **SETTINGS)
    assert path.read_bytes() == part

    # What every call says for itself does not count, whatever the target's own is; nor does the target's name.
    other.generation_config.top_p, other.generation_config.temperature = None, 0.3
    other.config.name_or_path = "elsewhere"
    assert regenerate(other, tokenizer, prompts, path, **SETTINGS).resumed == 3


def test_reasoning_marks_that_are_special_tokens_stay_in_the_history(target, tokenizer, tmp_path, monkeypatch):
    """The template cuts earlier reasoning by its marks: dropped with the special tokens, they would leave it in."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["w20", "w21"]})  # as <think> and </think>
    tokenizer.chat_template = TEMPLATE.replace("m['content'] }}", "m['content'].split('w21')[-1] }}")
    said = [WORDS.index(word) for word in ("w20", "w1", "w4", "w21", "w3", "</s>")]
    monkeypatch.setattr(
        target, "generate", lambda ids, **_: torch.cat([ids, torch.tensor([said]).expand(len(ids), -1)], dim=1)
    )
    rows = [{"id": 0, "turns": ["w5", "w6"]}]
    regenerate(target, tokenizer, rows, tmp_path / "a.jsonl", **{**SETTINGS, "max_prompt_length": 40})
    second = next(read_jsonl(tmp_path / "a.jsonl"))["prompt_ids"][1]
    assert tokenizer.decode(second) == "<s> user w5 </s> <s> assistant w3 </s> <s> user w6 </s> <s> assistant"


@pytest.mark.parametrize(
    ("settings", "prompts", "message"),
    [
        ({"batch_size": 0}, [], "batch_size is 0"),
        ({"max_new_tokens": 0}, [], "max_new_tokens is 0"),
        ({"temperatures": ()}, [], "temperatures is"),
        ({"temperatures": (-1.0,)}, [], "temperatures is"),
        ({"max_new_tokens": 60}, [], "context has 64"),
        ({}, [{"id": "a"}], "Row 0: it has the fields .* expected 'id' and either"),
        ({}, [{"prompt": "w1"}], "Row 0: it has the fields .* expected 'id' and either"),
        ({}, [{"id": "a", "prompt": "w1", "turns": ["w2"]}], "Row 0: it has the fields .* expected 'id' and either"),
        ({}, [{"id": 1, "prompt": "w1"}, {"id": 1, "prompt": "w2"}], "Row 1 has the id 1 of an earlier"),
        ({}, [{"id": 1, "prompt": 5}], r"Row 0: 'prompt' is 5"),
        *(({}, [{"id": 1, "turns": turns}], "a non-empty list of the user's turns") for turns in ([], "x", [1])),
        ({}, [{"id": 1, "prompt": "w1", "tools": 3}], "Prompt 1: 'tools' is 3"),
    ],
)
def test_bad_settings_and_prompts_are_refused(target, tokenizer, tmp_path, settings, prompts, message):
    with pytest.raises(ValueError, match=message):
        regenerate(target, tokenizer, prompts, tmp_path / "a.jsonl", **{**SETTINGS, **settings})
    assert not (tmp_path / "a.jsonl").exists()


def test_targets_and_outputs_that_do_not_serve_are_refused(target, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"expected a \.jsonl file"):
        regenerate(target, tokenizer, [], tmp_path / "a.jsonl.gz", **SETTINGS)
    target = copy.deepcopy(target)
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


@pytest.mark.parametrize("dash", ["_", "-"])
def test_command_line(target, tokenizer, tmp_path, capsys, dash):
    target.save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    prompts = make_prompts()
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    arguments = {
        "--target": tmp_path / "target",
        "--prompts": tmp_path / "prompts.jsonl",
        "--output": tmp_path / "out" / "answers.jsonl",
        "--dtype": "float64",
        "--device": "cpu",
        f"--max{dash}new{dash}tokens": 12,
        f"--batch{dash}size": 3,
        "--max_prompt_length": 12,
        "--seed": 5,
    }
    argv = [str(part) for pair in arguments.items() for part in pair] + ["--temperatures", "0.0", "0.8"]
    regeneration.main(argv)
    assert "answers written: 20" in capsys.readouterr().out
    target = copy.deepcopy(target)
    target.config.name_or_path = "target"  # the folder, without the way to it
    regenerate(target, tokenizer, prompts, tmp_path / "direct.jsonl", **SETTINGS)
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == (tmp_path / "direct.jsonl").read_bytes()
