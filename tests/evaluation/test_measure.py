"""What a measurement counts, against plain `generate`, recounts from the ids alone and closed forms."""

import json
import shutil
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch
from questions_and_words import QUESTIONS, tiny_tokenizer
from transformers import GenerationConfig

from helpers import make_tiny_target
from transformers_confu import ConFuCandidateGenerator, ConFuDraftModel
from transformers_confu.evaluation import answering
from transformers_confu.evaluation import measure as measuring
from transformers_confu.evaluation.answering import Models
from transformers_confu.evaluation.arguments import EvaluationArguments
from transformers_confu.evaluation.arms import Arm, Setting, labels
from transformers_confu.evaluation.figures import comparisons_of
from transformers_confu.evaluation.questions import Question
from transformers_confu.evaluation.records import RecordFile
from transformers_confu.evaluation.report import about
from transformers_confu.inference.draft_tree import DraftTree


FEW = {"contemplations": ["3"], "baselines": ["plain"], "runs": 1}


def measure(options, **changes):
    return measuring.measure(EvaluationArguments(**options | changes))


def answers_of(options):
    """Every answer with what its unit says, and the label of its arm."""
    file = RecordFile(options["output"])
    names = labels(Arm(**answer["arm"]) for _, answer in file.answers)
    return [unit | answer | {"label": names[Arm(**answer["arm"])]} for unit, answer in file.answers]


def plain_answer(target, prompt, max_new_tokens):
    ids = torch.tensor([prompt])
    return target.generate(ids, do_sample=False, max_new_tokens=max_new_tokens)[0, len(prompt) :].tolist()


def test_every_arm_answers_every_turn_of_every_question_and_runs_are_added(options, answered):
    first = answers_of(options)
    measure(options, runs=2)
    rows = answers_of(options)
    assert rows[: len(first)] == first and len(rows) == 2 * len(first)
    drafted = ["EAGLE-3 mode, N = 8", "ConFu, C = 3, N = 8", "ConFu, C = N, N = 8"]
    assert Counter((row["run"], row["question_id"], row["label"]) for row in rows) == Counter(
        (run, str(question["question_id"]), label)
        for run in range(2)
        for question in QUESTIONS
        for label in ("plain generate", "prompt lookup", *drafted)
    )
    target, tokenizer = make_tiny_target(), tiny_tokenizer()
    orders = {}
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
        orders.setdefault((row["run"], row["question_id"]), []).append(row["order"])
    assert all(sorted(order) == list(range(5)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) > 1  # not always the same


def test_sampled_texts_are_plain_generations_and_differ_from_run_to_run(options):
    measure(options, temperatures=[1.0], contemplations=["0", "3"], runs=2)
    texts = {}
    for row in answers_of(options):
        ids = [turn["token_ids"] for turn in row["turns"]]
        if row["label"] != "prompt lookup":  # which draws along its own way
            assert row["departure"] is None
            assert texts.setdefault((row["run"], row["question_id"]), ids) == ids
    assert texts[0, "81"] != texts[1, "81"]


def test_rounds_of_prompt_lookup_and_an_assistant_are_what_the_cache_gains(options, tmp_path):
    assistant = make_tiny_target()
    with torch.no_grad():  # often right, not always
        assistant.lm_head.weight += 0.2 * torch.randn(97, 32, generator=torch.Generator().manual_seed(0))
    assistant.save_pretrained(tmp_path / "assistant")
    options |= FEW | {"max_new_tokens": [60], "drafts": [], "baselines": ["plain", "prompt_lookup"]}
    expected = {"prompt_lookup": [], "assistant": []}
    own_generate = type(make_tiny_target()).generate

    def watching(target, *args, **kwargs):
        written = []  # tokens before each forward, of which the newest is in no cache

        def watch(module, args, kwargs):
            written.append(kwargs["cache"].get_seq_length() + 1)

        with_lookup = kwargs["generation_config"].prompt_lookup_num_tokens is not None
        kind = "prompt_lookup" if with_lookup else "assistant" if "assistant_model" in kwargs else None
        if kind is None:
            return own_generate(target, *args, **kwargs)
        handle = target.register_forward_pre_hook(watch, with_kwargs=True)
        output = own_generate(target, *args, **kwargs)
        handle.remove()
        written.append(output.shape[1])
        expected[kind].append([after - before for before, after in zip(written[1:], written[2:], strict=False)])
        return output

    with mock.patch.object(type(assistant), "generate", watching), mock.patch.object(Models, "warm_up"):
        measure(options, assistant=str(tmp_path / "assistant"))
    rows = answers_of(options)
    for kind, counts in expected.items():
        turns = [turn for row in rows if row["arm"]["kind"] == kind for turn in row["turns"]]
        assert [turn["rounds"]["emitted"] for turn in turns] == counts
        assert any(count > 1 for emitted in counts for count in emitted)
        assert all(len(turn["token_ids"]) > sum(turn["rounds"]["emitted"]) for turn in turns)  # prefill emitted, too
    make_tiny_target("hybrid").save_pretrained(tmp_path / "hybrid")
    tiny_tokenizer().save_pretrained(tmp_path / "hybrid")
    with pytest.raises(ValueError, match="has neither .* for Qwen3_5ForCausalLM, .*give `--baselines plain`"):
        measure(options, target=str(tmp_path / "hybrid"), output=str(tmp_path / "hybrid.jsonl"))
    make_tiny_target(vocab_size=60).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="has a vocabulary of 60 tokens and the target one of 97; give an assistant"):
        measure(options, assistant=str(tmp_path / "other"), output=str(tmp_path / "other.jsonl"))


# --- a draft whose proposals are known


def chain_after(answer, start, depth):
    """The next tokens of an answer, some of them spoilt; which ones depends on both places only."""
    return [
        (token + 1) % 97 if (7 * start + place**2) % 13 < 4 else token
        for place, token in enumerate(answer[start : start + depth], start=start)
    ]


def recount(answer, depth):
    """Emitted and accepted of each round, from the ids and the chains alone."""
    emitted, accepted, written = [], [], 1
    while written < len(answer):
        chain = chain_after(answer, written, min(depth, len(answer) - written - 1))
        count = 0
        while count < len(chain) and chain[count] == answer[written + count]:
            count += 1
        accepted.append(count)
        emitted.append(count + 1)
        written += count + 1
    return emitted, accepted


def test_what_rounds_emit_and_accept_is_what_a_recount_from_the_ids_gives(options):
    depth, new_tokens, target, answer = 4, 60, make_tiny_target(), []
    own_decode = ConFuDraftModel.confu_decode

    def decode(draft, target_, input_ids, **kwargs):
        answer[:] = plain_answer(target, input_ids[0].tolist(), new_tokens)
        return own_decode(draft, target_, input_ids, **kwargs)

    def propose(generator, root_tokens, rounds, max_depth, *others):
        generator._pending = generator._pending[-1:]
        tokens = [int(root_tokens[0]), *chain_after(answer, new_tokens - max_depth - 1, min(depth, max_depth))]
        ranks = torch.arange(len(tokens))[None]
        return DraftTree.from_parents(torch.tensor([tokens]), (ranks - 1).clamp(min=0), -ranks)

    changes = {"max_new_tokens": [new_tokens], "tree_sizes": [str(depth + 1)], "contemplations": ["0"]}
    with (
        mock.patch.object(ConFuDraftModel, "confu_decode", decode),
        mock.patch.object(ConFuCandidateGenerator, "propose", propose),
        mock.patch.object(Models, "warm_up"),
    ):
        file = measure(options, **FEW | changes)
    turns = [turn for row in answers_of(options) if row["arm"]["kind"] == "draft" for turn in row["turns"]]
    counts = [recount(turn["token_ids"], depth) for turn in turns]
    assert [(turn["rounds"]["emitted"], turn["rounds"]["accepted"]) for turn in turns] == counts
    assert {0, 1, 2, 4} <= {count for _, accepted in counts for count in accepted}
    (comparison,) = comparisons_of([file])
    rounds = [count for emitted, _ in counts for count in emitted]
    assert comparison.tau()[comparison.drafted[0]][0] == pytest.approx(sum(rounds) / len(rounds))


def test_the_other_layout_answers_by_a_second_target(options, monkeypatch):
    other = make_tiny_target(seed=3).float()
    monkeypatch.setattr(answering, "copy_in_other_layout", lambda target: other)
    options["baselines"] = ["plain", "other_layout"]
    with pytest.raises(
        ValueError, match="is for float32 on a CPU, .* the target is in torch.float64 on cpu. Leave it"
    ):
        measure(options, drafts=[])
    measure(options, drafts=[], dtypes=["float32"])
    rows = [row for row in answers_of(options) if row["label"] == "plain generate, other layout"]
    for row, question in zip(rows, QUESTIONS, strict=True):
        prompt = tiny_tokenizer()(f"a{question['turns'][0]}b", add_special_tokens=False)["input_ids"]
        assert row["turns"][0]["token_ids"] == plain_answer(other, prompt, 12)


# --- stopping and going on


def without_timings(path):
    def strip(row):
        if isinstance(row, dict):
            return {name: strip(value) for name, value in row.items() if name not in ("seconds", "peak_memory_bytes")}
        return [strip(entry) for entry in row] if isinstance(row, list) else row

    return [strip(json.loads(line)) for line in Path(path).read_text().splitlines()]


def test_an_interrupted_measurement_goes_on_as_if_it_had_not_been(options, tmp_path):
    options |= FEW | {"temperatures": [0.0, 1.0], "max_new_tokens": [6]}
    whole, path = tmp_path / "whole.jsonl", tmp_path / "records.jsonl"
    measure(options, output=str(whole))
    units, own = 0, Models.answer

    def stop_after_three(*args):
        nonlocal units
        if units == 3:
            raise KeyboardInterrupt
        units += 1
        return own(*args)

    with mock.patch.object(Models, "answer", stop_after_three), pytest.raises(KeyboardInterrupt):
        measure(options)
    assert len(path.read_bytes().splitlines()) == 1 + 3
    path.write_bytes(path.read_bytes()[:-20])  # torn within the last line
    measure(options)
    assert without_timings(path) == without_timings(whole)
    before = path.read_bytes()
    with mock.patch.object(Models, "load", side_effect=AssertionError("nothing is left to measure")):
        measure(options)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seed": 1}, r"holds another measurement \(seed was 0, is 1\); choose another `output`"),
        ({"max_new_tokens": [13]}, r"\(max_new_tokens was \[12\], is \[13\]\)"),
        ({"chat_template_kwargs": '{"polite": true}'}, r"\(chat_template_kwargs was None, is \{'polite': True\}\)"),
        ({"drafts": []}, r"\(own_knobs was .*'confu_tree_size': 5.*\)"),
        ({"output": "records.gz"}, "`output` is records.gz; expected a .jsonl file"),
    ],
)
def test_a_file_of_another_measurement_is_refused(options, answered, tiny_folders, tmp_path, change, message):
    other = shutil.copytree(tiny_folders["draft"], tmp_path / "other")
    knobs = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(json.dumps(knobs | {"confu_tree_size": 5}))
    if "drafts" in change:  # the same weights with other knobs of their own
        change = {"drafts": [f"draft={other}"]}
    before = Path(options["output"]).read_bytes()
    with pytest.raises(ValueError, match=message):
        measure(options, **change)
    assert Path(options["output"]).read_bytes() == before


def test_another_machine_may_report_but_not_measure_on(options, answered):
    with mock.patch.object(measuring, "describe_machine", return_value={"device": "another"}):
        assert measure(options).settings["machine"]["device"] == "cpu"  # where it was measured
        with pytest.raises(ValueError, match="another machine \\(.*device was 'cpu', is 'another'.*; choose"):
            measure(options, runs=2)


def test_options_may_be_set_right_while_nothing_is_measured(options):
    with pytest.raises(ValueError, match="dtype is 'float46'"):
        measure(options, dtypes=["float46"])
    assert {unit["setting"]["dtype"] for unit in measure(options, **FEW).units.values()} == {"float64"}


@pytest.mark.parametrize("content", ["not json\n", '{"kind": "answer"}\n'])
def test_a_foreign_file_is_refused_and_kept(options, content):
    Path(options["output"]).write_text(content)
    with pytest.raises(ValueError, match="records.jsonl"):
        measure(options)
    assert Path(options["output"]).read_text() == content


def test_own_knobs_are_read_or_the_measurement_does_not_start(options, tiny_folders, tmp_path, monkeypatch):
    draft = shutil.copytree(tiny_folders["draft"], tmp_path / "draft")
    (draft / "generation_config.json").write_text('{"confu_tree_size": 4')  # torn
    with pytest.raises(ValueError, match="generation_config.json is no valid JSON"):
        measure(options, drafts=[str(draft)])
    (draft / "generation_config.json").unlink()  # a draft need not have one
    assert measuring.own_generation_config(str(draft)).to_diff_dict() == GenerationConfig().to_diff_dict()

    monkeypatch.setattr(measuring, "cached_file", mock.Mock(return_value=None))  # nor one on the Hub
    assert measuring.own_generation_config("org/draft").to_diff_dict() == GenerationConfig().to_diff_dict()
    measuring.cached_file.side_effect = OSError("offline")  # it may have one
    with pytest.raises(ValueError, match="org/nowhere is no folder and cannot be had from the Hub"):
        measure(options, drafts=["org/nowhere"])
    assert not Path(options["output"]).exists()


# --- conversations


def test_options_of_the_chat_template(options, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if polite %}c{% endif %}" + tokenizer.chat_template
    make_tiny_target().save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    measure(options, **FEW, target=str(tmp_path / "target"), chat_template_kwargs='{"polite": true}')
    lengths = {row["question_id"]: row["turns"][0]["prompt_tokens"] for row in answers_of(options)}
    assert lengths == {str(q["question_id"]): len(tokenizer(f"ca{q['turns'][0]}b")["input_ids"]) for q in QUESTIONS}


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


def test_turns_that_are_too_long_are_left_out_and_named(options, tmp_path):
    questions = tmp_path / "long.jsonl"
    long = [
        {"question_id": 7, "category": "rag", "turns": ["abc" * 200]},
        {"question_id": 8, "category": "rag", "turns": ["abc", "abc" * 200, "a"]},
    ]
    questions.write_text("".join(json.dumps(question) + "\n" for question in [*long, QUESTIONS[1]]))
    changes = FEW | {"questions": str(questions)}
    with mock.patch.object(answering.logger, "warning") as warning:
        file = measure(options, **changes)
    first, second = (call.args[0] % call.args[1:] for call in warning.call_args_list)
    assert first.startswith("Question 7: 1 of its turns, with an answer of up to 12 tokens, exceed the target's")
    assert second.startswith("Question 8: 2 of its turns")
    counts = {(row["question_id"], len(row["turns"]), row["skipped_turns"]) for row in answers_of(options)}
    assert counts == {("7", 0, 1), ("8", 1, 2), ("91", 1, 0)}
    (comparison,) = comparisons_of([file])
    assert comparison.questions == ["8", "91"]
    assert "; turns that exceed the target's context are left out, of 7, 8 (ids). Runs: 1." in about(file)
    with mock.patch.object(Models, "load", side_effect=AssertionError("nothing is left to measure")):
        measure(options, **changes)
    questions.write_text(json.dumps(long[0]))
    with pytest.raises(ValueError, match="none.jsonl holds no answers; run its `confu evaluate`, with questions that"):
        comparisons_of([measure(options, **changes | {"output": str(tmp_path / "none.jsonl")})])


def test_answers_end_with_eos_for_all_arms_alike(options, tmp_path):
    target = make_tiny_target()
    eos = plain_answer(target, tiny_tokenizer()("aabcdefb")["input_ids"], 12)[5]
    target.config.eos_token_id = target.generation_config.eos_token_id = eos
    target.save_pretrained(tmp_path / "target")
    tiny_tokenizer().save_pretrained(tmp_path / "target")
    measure(options, target=str(tmp_path / "target"))
    lengths = {}
    for row in answers_of(options):
        for number, turn in enumerate(row["turns"]):
            ids = turn["token_ids"]
            assert eos not in ids[:-1] and (ids[-1] == eos or len(ids) == 12)
            assert lengths.setdefault((row["question_id"], number), len(ids)) == len(ids)
            if row["arm"]["kind"] == "draft":
                assert sum(turn["rounds"]["emitted"]) == len(ids) - 1
    assert lengths["81", 0] <= 6
