"""What a measurement counts, against plain `generate`, recounts from the ids alone and closed forms."""

import json
import shutil
from collections import Counter
from unittest import mock

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
from questions_and_words import QUESTIONS, tiny_tokenizer
from transformers import GenerationConfig

from helpers import make_tiny_target
from transformers_confu import ConFuCandidateGenerator, ConFuDraftModel
from transformers_confu.common import loading
from transformers_confu.evaluation import answering
from transformers_confu.evaluation import measure as measuring
from transformers_confu.evaluation.answering import Models
from transformers_confu.evaluation.arguments import EvaluationArguments
from transformers_confu.evaluation.arms import Arm, Setting, labels
from transformers_confu.evaluation.figures import comparisons_of
from transformers_confu.evaluation.measure import measure
from transformers_confu.evaluation.metrics.confu_acceptance import acceptance
from transformers_confu.evaluation.questions import Question
from transformers_confu.evaluation.records import RecordFile
from transformers_confu.evaluation.report import about
from transformers_confu.inference.draft_tree import DraftTree


def answers_of(options):
    """Every answer with what its unit says, and the label of its arm."""
    file = RecordFile(options["output"])
    names = labels(Arm(**answer["arm"]) for _, answer in file.answers)
    return [unit | answer | {"label": names[Arm(**answer["arm"])]} for unit, answer in file.answers]


def plain_answer(target, prompt, max_new_tokens):
    ids = torch.tensor([prompt])
    return target.generate(ids, do_sample=False, max_new_tokens=max_new_tokens)[0, len(prompt) :].tolist()


def test_every_arm_answers_every_turn_of_every_question_in_every_run(options):
    measure(EvaluationArguments(**options))
    rows = answers_of(options)
    labels = [
        "plain generate",
        "prompt lookup",
        "EAGLE-3 mode, N = 8",
        "ConFu, C = 3, N = 8",
        "ConFu, C = N, N = 8",
    ]
    assert Counter((row["run"], row["question_id"], row["label"]) for row in rows) == Counter(
        (run, str(question["question_id"]), label) for run in range(2) for question in QUESTIONS for label in labels
    )
    target, tokenizer = make_tiny_target(), tiny_tokenizer()
    for row in rows:
        question = next(q for q in QUESTIONS if str(q["question_id"]) == row["question_id"])
        assert row["group"] == ("qa" if question["category"] == "qa" else "mt_bench")
        assert len(row["turns"]) == len(question["turns"]) and row["skipped_turns"] == 0
        text = ""
        for said, turn in zip(question["turns"], row["turns"], strict=True):
            # The template by hand: an "a" before each message, a "b" where the answer starts.
            prompt = tokenizer(f"{text}a{said}b", add_special_tokens=False)["input_ids"]
            assert turn["prompt_tokens"] == len(prompt)
            assert turn["token_ids"] == plain_answer(target, prompt, 12)
            text += f"a{said}a{tokenizer.decode(turn['token_ids'], skip_special_tokens=True)}"
            assert turn["seconds"] > 0
        assert row["departure"] is None
    orders = {(row["run"], row["question_id"]): [] for row in rows}
    for row in rows:
        orders[row["run"], row["question_id"]].append(row["order"])
    assert all(sorted(order) == list(range(5)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) > 1  # not always the same


def test_sampled_texts_are_plain_generations_and_differ_from_run_to_run(options):
    measure(EvaluationArguments(**options | {"temperatures": [1.0]}))
    texts = {}
    for row in answers_of(options):
        ids = [turn["token_ids"] for turn in row["turns"]]
        if row["label"] != "prompt lookup":  # which draws along its own way
            assert row["departure"] is None
            assert texts.setdefault((row["run"], row["question_id"]), ids) == ids
    assert texts[0, "81"] != texts[1, "81"]


@pytest.mark.parametrize("kind", ["prompt_lookup", "assistant"])
def test_rounds_of_other_arms_are_what_the_cache_gains(options, kind, tmp_path):
    assistant = make_tiny_target()
    with torch.no_grad():  # often right, not always
        assistant.lm_head.weight += 0.2 * torch.randn(97, 32, generator=torch.Generator().manual_seed(0))
    assistant.save_pretrained(tmp_path / "assistant")
    options |= {"max_new_tokens": [60], "runs": 1, "contemplations": ["0"], "assistant": str(tmp_path / "assistant")}
    expected = []
    own_generate = type(make_tiny_target()).generate

    def watching(target, *args, **kwargs):
        written = []  # tokens before each forward, of which the newest is in no cache

        def watch(module, args, kwargs):
            written.append(kwargs["cache"].get_seq_length() + 1)

        with_lookup = kwargs["generation_config"].prompt_lookup_num_tokens is not None
        with_assistant = "assistant_model" in kwargs and not isinstance(kwargs["assistant_model"], ConFuDraftModel)
        if not (with_lookup if kind == "prompt_lookup" else with_assistant):
            return own_generate(target, *args, **kwargs)
        handle = target.register_forward_pre_hook(watch, with_kwargs=True)
        output = own_generate(target, *args, **kwargs)
        handle.remove()
        written.append(output.shape[1])
        expected.append([after - before for before, after in zip(written[1:], written[2:], strict=False)])
        return output

    with mock.patch.object(type(make_tiny_target()), "generate", watching):
        measure(EvaluationArguments(**options))
    turns = [turn for row in answers_of(options) if row["arm"]["kind"] == kind for turn in row["turns"]]
    assert [turn["rounds"]["emitted"] for turn in turns] == expected[1:]  # the first was the warm-up
    assert any(count > 1 for counts in expected for count in counts)
    for turn in turns:
        assert len(turn["token_ids"]) - sum(turn["rounds"]["emitted"]) >= 1  # what prefill emitted


def test_a_target_may_be_split_and_bring_code(options, tmp_path):
    options |= {"runs": 1, "max_turns": 1, "contemplations": ["3"], "baselines": ["plain"]}
    measure(EvaluationArguments(**options))
    whole = {row["question_id"]: row["turns"][0]["token_ids"] for row in answers_of(options)}
    split = {"device": None, "device_map": '{"": "cpu"}', "trust_remote_code": True}
    options |= split | {"output": str(tmp_path / "split.jsonl")}
    with mock.patch("transformers_confu.common.loading.load_target", wraps=loading.load_target) as load_target:
        file = measure(EvaluationArguments(**options))
    assert load_target.call_args.args[2:] == (None, '{"": "cpu"}', True)
    assert all(row["turns"][0]["token_ids"] == whole[row["question_id"]] for row in answers_of(options))
    assert file.settings["device_map"] == '{"": "cpu"}'  # another placement is another measurement


def test_an_assistant_model_is_one_more_arm(options, tmp_path):
    make_tiny_target(seed=3).save_pretrained(tmp_path / "assistant")
    options |= {"assistant": str(tmp_path / "assistant"), "drafts": [], "runs": 1}
    measure(EvaluationArguments(**options))
    rows = [row for row in answers_of(options) if row["label"] == "assistant model"]
    assert len(rows) == len(QUESTIONS)
    for row in rows:
        assert row["departure"] is None
        for turn in row["turns"]:
            assert 0 < sum(turn["rounds"]["emitted"]) < len(turn["token_ids"])
    make_tiny_target(vocab_size=60).save_pretrained(tmp_path / "other")
    options |= {"assistant": str(tmp_path / "other"), "output": str(tmp_path / "other.jsonl")}
    with pytest.raises(ValueError, match="has a vocabulary of 60 tokens and the target one of 97; give an assistant"):
        measure(EvaluationArguments(**options))


# --- a draft whose acceptance is known


class Corrupted:
    r"""
    In place of the draft's own proposals: chains of the target's own answer, each token spoilt with probability p.

    Whether the token at a place of the answer is spoilt in the round that starts at another place depends on nothing
    else, so that counts can be made again from the ids alone.
    """

    def __init__(self, probability: float, depth: int, max_new_tokens: int):
        self.probability, self.depth, self.max_new_tokens = probability, depth, max_new_tokens
        self.target = make_tiny_target()
        self.answers: dict[tuple[int, ...], list[int]] = {}
        self.prompt: tuple[int, ...] = ()

    def answer(self, prompt: tuple[int, ...]) -> list[int]:
        if prompt not in self.answers:
            self.answers[prompt] = plain_answer(self.target, list(prompt), self.max_new_tokens)
        return self.answers[prompt]

    def spoilt(self, prompt: tuple[int, ...], start: int, place: int) -> bool:
        seed = hash((prompt, start, place)) % 2**31  # of integers: the same in every process
        return torch.rand(1, generator=torch.Generator().manual_seed(seed)).item() < self.probability

    def chain(self, prompt: tuple[int, ...], start: int, depth: int) -> list[int]:
        """Behind the first `start` tokens of the answer."""
        return [
            (token + 1) % 97 if self.spoilt(prompt, start, place) else token
            for place, token in enumerate(self.answer(prompt)[start : start + depth], start=start)
        ]

    def patches(self):
        own_decode = ConFuDraftModel.confu_decode

        def decode(draft, target, input_ids, **kwargs):
            self.prompt = tuple(input_ids[0].tolist())
            return own_decode(draft, target, input_ids, **kwargs)

        def propose(generator, root_tokens, tree_size, max_depth, future_states):
            generator._pending = generator._pending[-1:]
            written = self.max_new_tokens - max_depth - 1
            tokens = [int(root_tokens[0]), *self.chain(self.prompt, written, min(self.depth, max_depth))]
            count = len(tokens)
            return DraftTree.from_parents(
                torch.tensor([tokens]),
                torch.tensor([[max(0, i - 1) for i in range(count)]]),
                -torch.arange(count)[None],
            )

        return mock.patch.multiple(ConFuDraftModel, confu_decode=decode), mock.patch.object(
            ConFuCandidateGenerator, "propose", propose
        )


def recount(corrupted, prompt, answer):
    """Emitted and accepted of each round, from the ids and the chains alone."""
    emitted, accepted, written = [], [], 1
    while written < len(answer):
        chain = corrupted.chain(prompt, written, min(corrupted.depth, len(answer) - written - 1))
        count = 0
        while count < len(chain) and chain[count] == answer[written + count]:
            count += 1
        accepted.append(count)
        emitted.append(count + 1)
        written += count + 1
    return emitted, accepted


def expected(alpha, depth, tokens):
    """Mean rounds, and mean rounds that accept l or more, of a text of `tokens` tokens in rounds."""
    rounds, survivors = [0.0], [[0.0] * depth]
    for left in range(1, tokens + 1):
        deepest = min(depth, left - 1)
        law = [alpha**k * (1 - alpha) for k in range(deepest)] + [alpha**deepest]
        rounds.append(1 + sum(p * rounds[left - k - 1] for k, p in enumerate(law)))
        survivors.append(
            [
                sum(p * ((k > level) + survivors[left - k - 1][level]) for k, p in enumerate(law))
                for level in range(depth)
            ]
        )
    return rounds[-1], survivors[-1]


@pytest.mark.parametrize("probability", [0.2, 0.5])
def test_a_draft_of_known_acceptance_is_measured_as_the_closed_form_says(options, probability, tmp_path):
    depth, new_tokens = 4, 80
    prompts = ["".join("abcdefghi"[(i * j + j) % 9] for i in range(8)) for j in range(12)]
    questions = tmp_path / "prompts.txt"
    questions.write_text("\n".join(prompts))
    options |= {"questions": str(questions), "max_new_tokens": [new_tokens], "tree_sizes": [depth + 1], "runs": 1}
    options |= {"contemplations": ["0"], "baselines": ["plain"]}
    corrupted = Corrupted(probability, depth, new_tokens)
    decode, propose = corrupted.patches()
    with decode, propose, mock.patch.object(Models, "warm_up"):
        file = measure(EvaluationArguments(**options))

    tokenizer = tiny_tokenizer()
    for row in answers_of(options):
        if row["arm"]["kind"] == "draft":
            prompt = tuple(tokenizer(f"a{prompts[int(row['question_id']) - 1]}b")["input_ids"])
            turn = row["turns"][0]
            assert turn["token_ids"] == corrupted.answer(prompt)
            assert (turn["rounds"]["emitted"], turn["rounds"]["accepted"]) == recount(
                corrupted, prompt, turn["token_ids"]
            )

    (comparison,) = comparisons_of([file])
    (name,) = comparison.drafted
    answers = comparison.of(name)
    result = acceptance(answers["by_round"], answers["accepted"])
    rounds, survivors = expected(1 - probability, depth, new_tokens - 1)
    count = result["rounds"]
    assert result["tokens"] == len(prompts) * (new_tokens - 1)
    assert result["tau"] == pytest.approx((new_tokens - 1) / rounds, rel=0.08)
    assert comparison.tau()[name][0] == pytest.approx(result["tau"])
    for level, survivor in enumerate(survivors):
        share = survivor / rounds
        assert result["survival"][level] == pytest.approx(share, abs=4 * (share * (1 - share) / count) ** 0.5)
        assert result["accepted_by_depth"][level] == round(result["survival"][level] * count)
        # Far from the end of a text every step is accepted alike; the end of one in 80 tokens takes little off.
        assert result["conditional"][level] == pytest.approx(1 - probability, abs=0.1)


# --- stopping and going on


def without_timings(path):
    def strip(row):
        if isinstance(row, dict):
            return {name: strip(value) for name, value in row.items() if name not in ("seconds", "peak_memory_bytes")}
        return [strip(entry) for entry in row] if isinstance(row, list) else row

    with open(path, encoding="utf-8") as file:
        return [strip(json.loads(line)) for line in file]


@pytest.mark.parametrize("units, tear", [(0, 0), (3, 0), (3, 20)])
def test_an_interrupted_measurement_goes_on_as_if_it_had_not_been(options, tmp_path, units, tear):
    options |= {"temperatures": [0.0, 1.0], "one_factor": True, "runs": 1, "max_new_tokens": [6]}
    whole = tmp_path / "whole.jsonl"
    measure(EvaluationArguments(**options | {"output": str(whole)}))

    answered, own = 0, Models.answer

    def stop_after(*args):
        nonlocal answered
        if answered == units:
            raise KeyboardInterrupt
        answered += 1
        return own(*args)

    with mock.patch.object(Models, "answer", stop_after), pytest.raises(KeyboardInterrupt):
        measure(EvaluationArguments(**options))
    path = tmp_path / "records.jsonl"
    assert len(path.read_bytes().splitlines()) == 1 + units
    path.write_bytes(path.read_bytes()[: -tear or None])  # torn within the last line
    measure(EvaluationArguments(**options))
    assert without_timings(path) == without_timings(whole)
    before = path.read_bytes()
    with mock.patch.object(Models, "load", side_effect=AssertionError("nothing is left to measure")):
        measure(EvaluationArguments(**options))
    assert path.read_bytes() == before


def test_runs_can_be_added(options):
    measure(EvaluationArguments(**options | {"runs": 1}))
    first = answers_of(options)
    measure(EvaluationArguments(**options | {"runs": 2}))
    rows = answers_of(options)
    assert rows[: len(first)] == first and len(rows) == 2 * len(first)


@pytest.mark.parametrize("change", [{"seed": 1}, {"max_new_tokens": [13]}, {"temperatures": [0.5]}])
def test_a_file_of_another_measurement_is_refused(options, change, tmp_path):
    measure(EvaluationArguments(**options | {"runs": 1}))
    before = (tmp_path / "records.jsonl").read_bytes()
    (name,) = change
    with pytest.raises(ValueError, match=rf"holds another measurement \({name} was .*\); choose another `output`"):
        measure(EvaluationArguments(**options | change))
    assert (tmp_path / "records.jsonl").read_bytes() == before


def test_another_machine_may_report_but_not_measure_on(options):
    measure(EvaluationArguments(**options | {"runs": 1}))
    with mock.patch.object(measuring, "describe_machine", return_value={"device": "another"}):
        file = measure(EvaluationArguments(**options | {"runs": 1}))
        assert file.settings["machine"]["device"] == "cpu"  # where it was measured
        with pytest.raises(ValueError, match="another machine \\(.*device was 'cpu', is 'another'.*; choose"):
            measure(EvaluationArguments(**options | {"runs": 2}))


def test_options_may_be_set_right_while_nothing_is_measured(options, tmp_path):
    with pytest.raises(ValueError, match="dtype is 'float46'"):
        measure(EvaluationArguments(**options | {"dtypes": ["float46"]}))
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 1
    measure(EvaluationArguments(**options | {"runs": 1}))
    assert {row["setting"]["dtype"] for row in answers_of(options)} == {"float64"}


def test_a_draft_whose_own_knobs_have_changed_is_another_arm(options, tiny_folders, tmp_path):
    draft = shutil.copytree(tiny_folders["draft"], tmp_path / "draft")
    options |= {"drafts": [str(draft)], "tree_sizes": ["own"], "contemplations": ["default"], "runs": 1}
    options |= {"depths": [2]}
    knobs = json.loads((draft / "generation_config.json").read_text()) | {"confu_tree_size": 4}
    (draft / "generation_config.json").write_text(json.dumps(knobs))
    measure(EvaluationArguments(**options))
    before = (tmp_path / "records.jsonl").read_bytes()
    (draft / "generation_config.json").write_text(json.dumps(knobs | {"confu_tree_size": 5}))
    with pytest.raises(
        ValueError, match="arms ConFu, C = N, N = 4, .*, this measurement has .* N = 5, .*: a draft's own"
    ):
        measure(EvaluationArguments(**options))
    assert (tmp_path / "records.jsonl").read_bytes() == before


def test_own_knobs_are_read_or_the_measurement_does_not_start(options, tiny_folders, tmp_path, monkeypatch):
    draft = shutil.copytree(tiny_folders["draft"], tmp_path / "draft")
    options |= {"drafts": [str(draft)]}
    (draft / "generation_config.json").write_text('{"confu_tree_size": 4')  # torn
    with pytest.raises(ValueError, match="generation_config.json is no valid JSON"):
        measure(EvaluationArguments(**options))
    (draft / "generation_config.json").unlink()  # a draft need not have one
    assert measuring.own_generation_config(str(draft)).to_diff_dict() == GenerationConfig().to_diff_dict()

    hub = mock.Mock(side_effect=RemoteEntryNotFoundError("no such file", response=mock.Mock()))
    monkeypatch.setattr(measuring, "hf_hub_download", hub)
    assert measuring.own_generation_config("org/draft").to_diff_dict() == GenerationConfig().to_diff_dict()
    hub.side_effect = LocalEntryNotFoundError("offline")  # it may have one
    with pytest.raises(ValueError, match="nowhere is no folder and cannot be had from the Hub .offline"):
        measure(EvaluationArguments(**options | {"drafts": ["org/nowhere"]}))
    assert not (tmp_path / "records.jsonl").exists()


def test_options_of_the_chat_template(options, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if polite %}c{% endif %}" + tokenizer.chat_template
    make_tiny_target().save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    options |= {"target": str(tmp_path / "target"), "runs": 1, "max_turns": 1}
    measure(EvaluationArguments(**options | {"chat_template_kwargs": '{"polite": true}'}))
    lengths = {row["question_id"]: row["turns"][0]["prompt_tokens"] for row in answers_of(options)}
    assert lengths == {str(q["question_id"]): len(tokenizer(f"ca{q['turns'][0]}b")["input_ids"]) for q in QUESTIONS}
    with pytest.raises(ValueError, match="chat_template_kwargs was {'polite': True}, is None"):
        measure(EvaluationArguments(**options))


@pytest.mark.parametrize("content", ["[]\n", "not json\n", '{"kind": "answer"}\n', '{"a": 1}\n{"b": 2}'])
def test_a_foreign_file_is_refused_and_kept(options, content, tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match="records.jsonl"):
        measure(EvaluationArguments(**options))
    assert path.read_text() == content


def test_special_tokens_of_an_answer_stay_in_the_conversation_and_its_end_does_not(options):
    target, tokenizer = make_tiny_target(), tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["a"]})  # as `<think>` is in some vocabularies
    target.generation_config.eos_token_id = tokenizer.eos_token_id
    models = Models(EvaluationArguments(**options), target, tokenizer, {})
    answer = {"token_ids": [*tokenizer("ab")["input_ids"], tokenizer.eos_token_id]}
    calls = {Arm("plain"): {"generation_config": GenerationConfig(max_new_tokens=3)}}
    prompts = []

    def answer_prompt(target, prompt, kwargs, kind):
        prompts.append(prompt)
        return answer

    with mock.patch.object(answering, "answer_prompt", answer_prompt):
        models.answer(Question("1", "qa", ("b", "c")), 0, Setting("float64", 0.0, 3), calls)
    assert prompts == [tokenizer(text)["input_ids"] for text in ("abb", "ab" + "aab" + "acb")]


# --- texts that depart


def test_a_departure_tells_where_and_how_near_it_was(options):
    target = make_tiny_target()
    prompt = [2, 5, 9]
    text = plain_answer(target, prompt, 10)
    output = target.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=10, output_logits=True, return_dict_in_generate=True
    )
    other = list(text)
    other[6] = (text[6] + 3) % 97

    def departure(ids, greedy=True):
        return answering.departure([(prompt, {"token_ids": text})], [(prompt, {"token_ids": ids})], target, greedy)

    found = departure(other)
    logits = output.logits[6][0]
    assert (found["turn"], found["position"]) == (0, 6)
    assert found["gap"] == pytest.approx(float(logits[text[6]] - logits[other[6]]), abs=1e-5)
    assert departure(text) is None
    assert departure(other, greedy=False) == {"turn": 0, "position": 6, "gap": None}
    assert departure(text[:4]) == {"turn": 0, "position": 4, "gap": None}


# --- what does not fit


def test_a_prompt_that_is_too_long_is_named_and_the_others_are_measured(options, tmp_path, caplog):
    questions = tmp_path / "long.jsonl"
    long = {"question_id": 7, "category": "rag", "turns": ["abc" * 200]}
    questions.write_text("".join(json.dumps(question) + "\n" for question in [long, *QUESTIONS]))
    with mock.patch.object(measuring.logger, "warning") as warning:
        measure(EvaluationArguments(**options | {"questions": str(questions), "runs": 1}))
    assert {row["question_id"] for row in answers_of(options)} == {"81", "91", "201", "203"}
    message = warning.call_args_list[0].args
    assert message[0] % message[1:] == (
        "Question 7 is left out: 602 tokens and an answer of up to 12 exceed the target's context of 512."
    )
    assert RecordFile(options["output"]).left_out == {"7": 602}
    before = (tmp_path / "records.jsonl").read_bytes()
    with mock.patch.object(Models, "load", side_effect=AssertionError("nothing is left to measure")):
        file = measure(EvaluationArguments(**options | {"questions": str(questions), "runs": 1}))
    assert (tmp_path / "records.jsonl").read_bytes() == before
    assert "Questions: 5 (SHA-256 of their content" in about(file)[0]
    assert "; left out, as they exceed the target's context: 7 (ids). Runs: 1." in about(file)[0]


def test_a_later_turn_that_is_too_long_is_counted_as_skipped(options, tmp_path):
    questions = tmp_path / "long.jsonl"
    questions.write_text(json.dumps({"question_id": 7, "category": "rag", "turns": ["abc", "abc" * 200, "a"]}))
    with mock.patch.object(answering.logger, "warning") as warning:
        measure(EvaluationArguments(**options | {"questions": str(questions), "runs": 1}))
    assert warning.called
    assert {(len(row["turns"]), row["skipped_turns"]) for row in answers_of(options)} == {(1, 2)}
    assert "; of 1 a later turn exceeded it. Runs: 1." in about(RecordFile(tmp_path / "records.jsonl"))[0]


def test_no_question_fits(options, tmp_path):
    questions = tmp_path / "long.txt"
    questions.write_text("abc" * 200)
    with pytest.raises(ValueError, match="No question fits into the target's context of 512 tokens"):
        measure(EvaluationArguments(**options | {"questions": str(questions)}))


def test_answers_end_with_eos_for_all_arms_alike(options, tiny_folders, tmp_path):
    target = make_tiny_target()
    prompt = tiny_tokenizer()("aabcdefb")["input_ids"]
    eos = plain_answer(target, prompt, 12)[5]
    folder = tmp_path / "target"
    target.config.eos_token_id = target.generation_config.eos_token_id = eos
    target.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    options |= {"target": str(folder), "max_turns": 1, "runs": 1}
    measure(EvaluationArguments(**options))
    lengths = {}
    for row in answers_of(options):
        (turn,) = row["turns"]
        ids = turn["token_ids"]
        assert eos not in ids[:-1] and (ids[-1] == eos or len(ids) == 12)
        assert lengths.setdefault(row["question_id"], len(ids)) == len(ids)
        if row["arm"]["kind"] == "draft":
            assert sum(turn["rounds"]["emitted"]) == len(ids) - 1
    assert lengths["81"] <= 6


def test_settings_read_as_what_they_are():
    assert str(Setting("bfloat16", 0.7, 128)) == "bfloat16, T = 0.7, up to 128 tokens"
