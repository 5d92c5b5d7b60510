"""Batched answers against one-by-one `generate`, and interrupted runs against whole ones."""

import copy
import json
import subprocess
import sys
from itertools import islice
from unittest import mock

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    PreTrainedTokenizerFast,
)

from helpers import make_tiny_target
from transformers_confu.data import continuous_batching, regeneration
from transformers_confu.data.continuous_batching import Request, RowCache, answer
from transformers_confu.data.dataset import load_jsonl, prepare_dataset
from transformers_confu.data.fingerprints import fingerprint_of_target
from transformers_confu.data.regeneration import regenerate, regenerate_turns


TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)
MARKED_TEMPLATE = TEMPLATE.replace(
    "{{ m['content'] }} </s>",
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} </s>{% endgeneration %}"
    "{% else %}{{ m['content'] }} </s>{% endif %}",
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
    # A random target hardly ever ends an answer: two ends make both finished and unfinished answers occur.
    model.generation_config.eos_token_id = [1, 7]
    return model


@pytest.fixture(params=[TEMPLATE, MARKED_TEMPLATE], ids=["plain", "marked"])
def tokenizer(request) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = request.param
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


def test_greedy_rows_equal_single_row_generate(target, tokenizer, tmp_path):
    prompts = make_prompts()
    report = regenerate(target, tokenizer, prompts, tmp_path / "a.jsonl", **{**SETTINGS, "temperatures": (0.0,)})
    rows = {row["id"]: row for row in load_jsonl(tmp_path / "a.jsonl")}

    assert sorted(rows) == sorted(prompt["id"] for prompt in prompts if prompt["id"] != "long")
    for prompt in prompts:
        if prompt["id"] == "long":
            continue
        words = prompt["prompt"] if isinstance(prompt["prompt"], str) else prompt["prompt"][0]["content"]
        ids = [WORDS.index(word) for word in f"<s> user {words} </s> <s> assistant".split()]
        expected = target.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12, pad_token_id=1)[0]
        row = rows[prompt["id"]]
        assert row == {
            "id": prompt["id"],
            "prompt": prompt["prompt"],
            "answer": tokenizer.decode(expected[len(ids) :], skip_special_tokens=True),
            "answer_ids": expected[len(ids) :].tolist(),
            "temperature": 0.0,
            "finished": int(expected[-1]) in (1, 7),
            "made_with": {
                "target": fingerprint_of_target(target),
                "generation": {"bos_token_id": 0, "eos_token_id": [1, 7]},
                "seed": 5,
            },
        }
    finished = [row["finished"] for row in rows.values()]
    assert any(finished) and not all(finished)
    assert (report.prompts, report.too_long, report.resumed, report.written) == (21, 1, 0, 20)
    assert report.unfinished == finished.count(False)
    assert report.tokens == sum(len(row["answer_ids"]) for row in rows.values())
    assert "20" in str(report)


class Interrupted(Exception):
    pass


def rows_of(path) -> list[dict]:
    """Rows in the order of their ids; that of the file is the order in which answers ended."""
    return sorted(load_jsonl(path), key=lambda row: row["id"])


@pytest.mark.parametrize("torn", [b"", b'{"id": "p', b'{"id": "p3", "prompt": "w0"}'])
@pytest.mark.parametrize("answers_before", [0, 1, 7])
def test_interrupted_and_resumed_equals_uninterrupted(target, tokenizer, tmp_path, monkeypatch, answers_before, torn):
    prompts = make_prompts()
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    regenerate(target, tokenizer, prompts, whole, **SETTINGS)

    def stops(*args):
        yield from islice(answer(*args), answers_before)
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(regeneration, "answer", stops)
        with pytest.raises(Interrupted):
            regenerate(target, tokenizer, prompts, parts, **SETTINGS)
    assert len(load_jsonl(parts)) == answers_before
    with open(parts, "ab") as file:
        file.write(torn)
    torch.manual_seed(99)  # the state of the process must not matter
    report = regenerate(target, tokenizer, prompts, parts, **SETTINGS)

    assert rows_of(parts) == rows_of(whole)
    assert (report.resumed, report.written) == (answers_before, 20 - answers_before)
    written = parts.read_bytes()
    assert regenerate(target, tokenizer, prompts, parts, **SETTINGS).written == 0
    assert parts.read_bytes() == written


def test_an_answer_does_not_depend_on_those_beside_it(target, tokenizer, tmp_path):
    prompts = make_prompts()
    for batch_size in (1, 3, 50):
        settings = {**SETTINGS, "batch_size": batch_size}
        regenerate(target, tokenizer, prompts, tmp_path / f"{batch_size}.jsonl", **settings)
    alone = rows_of(tmp_path / "1.jsonl")
    assert alone == rows_of(tmp_path / "3.jsonl") == rows_of(tmp_path / "50.jsonl")
    assert {row["temperature"] for row in alone} == {0.0, 0.8}


def test_rows_that_nothing_will_take_are_dropped(target):
    def make_requests() -> list[Request]:
        return [Request([3 + number, 4], 0.8, seed=number) for number in range(20)]

    def goes_on(request: Request) -> bool:
        return bool(request.answer_ids) and request.answer_ids[-1] not in (1, 7) and len(request.answer_ids) < 40

    requests, rows = make_requests(), {True: [], False: []}

    def look(module, args, kwargs):
        if isinstance(kwargs["cache"], RowCache):
            waiting = any(not request.answer_ids for request in requests)
            rows[waiting].append((len(kwargs["input_ids"]), sum(map(goes_on, requests))))

    with target.register_forward_pre_hook(look, with_kwargs=True):
        list(answer(target, requests, num_rows=16, capacity=42, max_new_tokens=40))
    assert {computed for computed, _ in rows[True]} == {16}
    assert all(computed < 2 * going_on for computed, going_on in rows[False])
    assert {16, 1} <= {computed for computed, _ in rows[False]}

    alone = make_requests()
    list(answer(target, alone, num_rows=1, capacity=42, max_new_tokens=40))
    assert [request.answer_ids for request in requests] == [request.answer_ids for request in alone]


def test_prompts_that_one_forward_cannot_hold_are_read_by_several(target, monkeypatch):
    def answers() -> list[list[int]]:
        requests = [Request([(3 * number + place) % 32 for place in range(6)], 0.8, number) for number in range(9)]
        list(answer(target, requests, num_rows=9, capacity=18, max_new_tokens=12))
        return [request.answer_ids for request in requests]

    together = answers()
    lengths_read = []
    read_prompts = continuous_batching._read_prompts
    monkeypatch.setattr(
        continuous_batching,
        "_read_prompts",
        lambda *args: lengths_read.append(len(args[-1])) or read_prompts(*args),
    )
    for most, expected in ((13, [2, 2, 2, 2, 1]), (5, [1] * 9)):
        monkeypatch.setattr(continuous_batching, "TOKENS_PER_READING", most)
        lengths_read.clear()
        assert answers() == together
        assert lengths_read == expected


@pytest.mark.parametrize("kind", ["qwen3", "GPT-NeoX", "GPT-2", "Mixtral"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_other_layouts_of_attention_answer_as_plain_generate(kind, implementation):
    """Keys normalised or partly rotated, learned positions, experts; rows of unlike lengths in each other's places."""
    if kind == "qwen3":
        target = make_tiny_target("qwen3")
    else:
        sizes = {"vocab_size": 97, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": None}
        config = {
            "GPT-NeoX": GPTNeoXConfig(
                hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, **sizes
            ),
            "GPT-2": GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=64, **sizes),
            # Its balancing loss, which some configurations ask for, cannot read the mask of rows of unlike lengths.
            "Mixtral": MixtralConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                num_local_experts=4,
                output_router_logits=True,
                **sizes,
            ),
        }[kind]
        torch.manual_seed(0)
        target = AutoModelForCausalLM.from_config(config).double().eval()
    target.set_attn_implementation(implementation)
    # Eager's softmax is in fp32, where the lowest number of fp64 is minus infinity; experts have no fp64.
    if implementation == "eager" or kind == "Mixtral":
        target.float()
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(97, (1 + index % 8,), generator=generator).tolist() for index in range(9)]
    plain = [
        target.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=10, pad_token_id=0)[0, len(prompt) :]
        for prompt in prompts
    ]
    # One token ends some of the answers early.
    end = int(plain[0][4])
    target.generation_config.eos_token_id = end
    requests = [Request(prompt, 0.0, 0) for prompt in prompts]
    answered = list(answer(target, requests, num_rows=4, capacity=18, max_new_tokens=10))
    assert sorted(map(id, answered)) == sorted(map(id, requests))
    for request, expected in zip(requests, plain, strict=True):
        expected = expected.tolist()
        assert request.answer_ids == (expected[: expected.index(end) + 1] if end in expected else expected)
    assert len({len(request.answer_ids) for request in requests}) > 1


def test_draws_follow_the_law_of_the_processed_scores(target):
    """Frequencies of the second token against the softmax that plain `generate` draws from."""
    torch.manual_seed(0)
    target.generation_config.top_k = 5
    try:
        prompt, number = [0, 3, 9, 4], 4000
        requests = [Request(prompt, 0.7, 1000 * seed) for seed in range(number)]
        answered = list(answer(target, requests, 500, 10, 1))
        scores = target(torch.tensor([prompt])).logits[0, -1] / 0.7
        kept = scores.topk(5)
        expected = torch.zeros(len(WORDS), dtype=torch.float64)
        expected[kept.indices] = kept.values.softmax(-1)
        found = torch.tensor([request.answer_ids[0] for request in answered]).bincount(minlength=len(WORDS)) / number
        assert found[expected == 0].sum() == 0
        # Five standard deviations of a frequency.
        assert ((found - expected).abs() < 5 * (expected * (1 - expected) / number).sqrt() + 1e-12).all()
    finally:
        target.generation_config.top_k = None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("repetition_penalty", 1.3, "RepetitionPenaltyLogitsProcessor"),
        ("num_beams", 2, "num_beams"),
        ("stop_strings", ["w3"], "stop_strings"),
    ],
)
def test_what_rows_of_different_lengths_cannot_apply_is_refused(target, tokenizer, tmp_path, name, value, message):
    setattr(target.generation_config, name, value)
    try:
        with pytest.raises(ValueError, match=f"asks for {message}, which"):
            regenerate(target, tokenizer, make_prompts(), tmp_path / "a.jsonl", **SETTINGS)
    finally:
        setattr(target.generation_config, name, None)


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
    for row in rows["a"] + rows["c"]:
        assert row.pop("made_with")["seed"] in (5, 6)
    for row, other in zip(rows["a"], rows["c"], strict=True):
        assert (row["id"], row["temperature"]) == (other["id"], other["temperature"])
        if row["temperature"] == 0:
            assert row == other
    assert rows["a"] != rows["c"]
    # Sorted by length, prompts take the temperatures in turn.
    assert [row["temperature"] for row in rows["a"]].count(0.0) == 10


def test_answers_load_into_prepare_dataset(target, tokenizer, tmp_path):
    regenerate(target, tokenizer, make_prompts(), tmp_path / "a.jsonl", **SETTINGS)
    rows = load_jsonl(tmp_path / "a.jsonl")
    dataset = prepare_dataset(rows, tokenizer, 64)
    for row, prepared in zip(rows, dataset, strict=True):
        assert [label for label in prepared["labels"] if label != -100] == row["answer_ids"]
        assert prepared["input_ids"][-len(row["answer_ids"]) :] == row["answer_ids"]


def test_answers_of_another_run_are_refused(target, tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    prompts = make_prompts()
    regenerate(target, tokenizer, prompts, path, **SETTINGS)
    written = path.read_bytes()
    for changed in ({"temperatures": (0.8, 0.0)}, {"max_new_tokens": 9}, {"max_new_tokens": 13}):
        with pytest.raises(ValueError, match=r"line \d+ is no answer .* this call would write"):
            regenerate(target, tokenizer, prompts, path, **{**SETTINGS, **changed})
    with pytest.raises(ValueError, match=r"line \d+ is no answer .* this call would write"):
        regenerate(target, tokenizer, prompts[:5], path, **SETTINGS)
    path.write_bytes(written + written.splitlines(keepends=True)[0])
    with pytest.raises(ValueError, match=r"line \d+ is no answer .* this call would write"):
        regenerate(target, tokenizer, prompts, path, **SETTINGS)
    for content, message in (
        (b"{broken\n" + written, "line 1 is not JSON"),
        (b'{"id": 1}\n{"id": 2}', "line 1 is no answer"),  # another file, its last line is not torn
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            regenerate(target, tokenizer, prompts, path, **SETTINGS)
        assert path.read_bytes() == content


def test_answers_of_another_seed_or_target_are_refused(target, tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    prompts = make_prompts()
    regenerate(target, tokenizer, prompts, path, **SETTINGS)
    written = path.read_bytes()
    part = b"".join(written.splitlines(keepends=True)[:3])
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

    # What every call says for itself does not count, whatever the target's own is.
    other.generation_config.top_p, other.generation_config.temperature = None, 0.3
    assert regenerate(other, tokenizer, prompts, path, **SETTINGS).resumed == 3
    path.write_bytes(part)

    # An older version did not write what it was made with.
    rows = [{name: value for name, value in row.items() if name != "made_with"} for row in load_jsonl(path)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with mock.patch.object(regeneration.logger, "warning") as warning:
        regenerate(target, tokenizer, prompts, path, **SETTINGS)
    assert warning.call_args.args[1:] == (path, 3)
    assert len(load_jsonl(path)) == 20


@pytest.mark.parametrize(
    ("settings", "prompts", "message"),
    [
        ({"batch_size": 0}, [], "batch_size is 0"),
        ({"max_new_tokens": 0}, [], "max_new_tokens is 0"),
        ({"temperatures": ()}, [], "temperatures is"),
        ({"temperatures": (-1.0,)}, [], "temperatures is"),
        ({"max_new_tokens": 60}, [], "context of 64 tokens"),
        ({}, [{"id": "a"}], "Prompt 0 has the fields"),
        ({}, [{"prompt": "w1"}], "Prompt 0 has the fields"),
        ({}, [{"id": 1, "prompt": "w1"}, {"id": 1, "prompt": "w2"}], "Prompt 1 has the id 1 of an earlier"),
        ({}, [{"id": 1, "prompt": 5}], r"Prompt 0 \(id 1\): 'prompt' is 5"),
    ],
)
def test_bad_settings_and_prompts_are_refused(target, tokenizer, tmp_path, settings, prompts, message):
    with pytest.raises(ValueError, match=message):
        regenerate(target, tokenizer, prompts, tmp_path / "a.jsonl", **{**SETTINGS, **settings})
    assert not (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize("row", [{"turns": ["w1", "w2"]}, {"id": "a"}, {"id": "a", "prompt": "w1", "turns": ["w2"]}])
def test_bad_conversations_are_refused(target, tokenizer, tmp_path, row):
    with pytest.raises(ValueError, match="Row 1: it has the fields .* expected 'id' and either"):
        regenerate_turns(target, tokenizer, [{"id": 0, "prompt": "w1"}, row], tmp_path / "a.jsonl", **SETTINGS)
    assert not list(tmp_path.iterdir())


def test_training_mode_and_compressed_output_are_refused(target, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"expected a \.jsonl file"):
        regenerate(target, tokenizer, [], tmp_path / "a.jsonl.gz", **SETTINGS)
    target.train()
    try:
        with pytest.raises(ValueError, match=r"call target\.eval\(\)"):
            regenerate(target, tokenizer, [], tmp_path / "a.jsonl", **SETTINGS)
    finally:
        target.eval()


def test_command_line(target, tokenizer, tmp_path, capsys):
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
        "--max_new_tokens": 12,
        "--batch_size": 3,
        "--max_prompt_length": 12,
        "--seed": 5,
    }
    argv = [str(part) for pair in arguments.items() for part in pair] + ["--temperatures", "0.0", "0.8"]
    regeneration.main(argv)
    assert "answers written: 20" in capsys.readouterr().out
    regenerate(target, tokenizer, prompts, tmp_path / "direct.jsonl", **SETTINGS)
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == (tmp_path / "direct.jsonl").read_bytes()
    with pytest.raises(ValueError, match="dtype is 'half-ish'"):
        regeneration.main([*argv, "--dtype", "half-ish"])


def test_module_runs_as_a_program():
    command = [
        sys.executable,
        "-W",
        "error::RuntimeWarning",
        "-m",
        "transformers_confu.cli",
        "data",
        "regenerate",
        "-h",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "--max_prompt_length" in result.stdout
