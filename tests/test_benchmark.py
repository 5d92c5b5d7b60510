"""The benchmark command on tiny models: what is counted, not how fast it is."""

import json
from dataclasses import replace

import pytest
import torch

from helpers import make_tiny_draft
from transformers_confu.evaluation.benchmark import (
    ARMS,
    BenchmarkArguments,
    Measurement,
    group_of,
    measure,
    stratified,
    table,
)


@pytest.fixture
def prompts():
    generator = torch.Generator().manual_seed(0)
    return [
        ({"question_id": number, "category": "qa"}, torch.randint(2, 97, (1, 6), generator=generator))
        for number in range(2)
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_arm_answers_every_question_with_the_same_text(tiny_llama, prompts, temperature):
    target = tiny_llama()
    draft = make_tiny_draft(target).double().eval()
    arguments = BenchmarkArguments(draft="", questions="", max_new_tokens=12, temperature=temperature, runs=2)
    reported: list[Measurement] = []
    measurements = measure(target, draft, prompts, arguments, reported.append)
    assert reported == measurements
    assert sorted((m.run, m.question_id, m.arm) for m in measurements) == sorted(
        (run, question, arm) for run in range(2) for question in range(2) for arm in ARMS
    )
    for m in measurements:
        # Prompt lookup draws along its own way when it samples: the same law, other texts.
        assert m.identical or (m.arm == "prompt lookup" and temperature > 0)
        assert m.tokens == 12 and m.group == "qa"
        # The first token comes from prefill; the others from rounds.
        assert (m.rounds > 0) == (m.arm in ("EAGLE-3 mode", "ConFu"))
        assert m.tokens_in_rounds == (11 if m.rounds else 0)
        assert sum(m.accepted_by_depth) <= m.tokens_in_rounds
        json.dumps(vars(m))


def test_the_table_gives_medians_and_totals():
    one = Measurement(
        run=0, question_id=0, group="qa", arm="plain", tokens=10, seconds=2.0, rounds=0, tokens_in_rounds=0,
        accepted_by_depth=[], identical=True,
    )  # fmt: skip
    measurements = []
    for run, seconds in enumerate((1.0, 2.0, 4.0)):
        for question in (0, 1):
            measurements.append(replace(one, run=run, question_id=question))
            measurements.append(replace(one, run=run, question_id=question, arm="prompt lookup"))
            measurements.append(replace(one, run=run, question_id=question, arm="EAGLE-3 mode", identical=False))
            measurements.append(
                replace(one, run=run, question_id=question, arm="ConFu", seconds=seconds, rounds=4, tokens_in_rounds=9)
            )
    rows = {line.split(" | ")[0][2:]: line for line in table(measurements).splitlines()[2:]}
    assert list(rows) == ARMS
    # 20 tokens in 2, 4 or 8 seconds, against 4 seconds; 18 tokens in 8 rounds.
    assert rows["ConFu"] == "| ConFu | 5.0 [2.5, 10.0] | 1.000 [0.500, 2.000] | 1.000 [0.500, 2.000] | 2.250 | 2/2 |"
    assert rows["EAGLE-3 mode"].endswith("|  | 0/2 |")


def test_questions_are_spread_over_the_groups():
    categories = ["writing"] * 5 + ["math"] * 5 + ["qa"] * 10 + ["rag"] * 3
    questions = [{"question_id": number, "category": category} for number, category in enumerate(categories)]
    chosen = stratified(questions, 8)
    groups = [group_of(question["category"]) for question in chosen]
    assert sorted(groups) == ["mt_bench"] * 3 + ["qa"] * 3 + ["rag"] * 2
    assert [q["question_id"] for q in chosen] == sorted(q["question_id"] for q in chosen)
    assert stratified(questions, 100) == questions
