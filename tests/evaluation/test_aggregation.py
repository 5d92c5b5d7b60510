"""Figures from records made by hand, against sums made by hand and against the law of large numbers."""

import csv
import io
import math
import random

import numpy as np
import pytest

from transformers_confu.evaluation.aggregation import Comparison, settings_of
from transformers_confu.evaluation.arms import Arm, Setting
from transformers_confu.evaluation.records import Answer, Departure, Rounds, Turn
from transformers_confu.evaluation.tables import (
    depth_table,
    difference_table,
    exactness_sentence,
    exactness_table,
    extra_cost_table,
    group_depth_table,
    group_difference_table,
    group_table,
    overview_table,
    rows_table,
    speed_table,
    tables_of,
    time_table,
)


SETTING = Setting("bfloat16", 0.0, 16)
PLAIN = Arm("plain")
EAGLE3 = Arm("draft", "d", 8, 4, 2, 0)
CONFU = Arm("draft", "d", 8, 4, 2, 4)


def answer(arm, question, run=0, seconds=2.0, accepted=(), tokens=None, group="qa", departure=None, setting=SETTING):
    """One turn; each round emits what it accepted and one token, and takes 0.1 s, half of it in the target."""
    accepted = list(accepted)
    rounds = None
    tokens = tokens or 1 + sum(accepted) + len(accepted)
    if arm.kind == "draft":
        count = len(accepted)
        parts = {"draft": 0.03, "target": 0.05, "walk": 0.01, "compaction": 0.005}
        rounds = Rounds(
            [a + 1 for a in accepted],
            accepted,
            tree_nodes=8 * count,
            contemplate_rows=arm.contemplation * count,
            seconds={name: value * count for name, value in parts.items()} | {"prefill": seconds - 0.1 * count},
            target_cache_bytes=2**20,
            draft_cache_bytes=2**18,
            transient_cache_bytes=2**19 + arm.contemplation,
        )
    turn = Turn(5, list(range(tokens)), seconds, rounds, 3 * 2**20, "")
    return Answer(run, setting, str(question), group, group, arm, 0, [turn], 0, departure)


def comparison_of(*answers, **kwargs):
    return Comparison(SETTING, answers, **kwargs)


@pytest.fixture
def small():
    """Two questions, three runs: plain takes 2 s for 8 tokens; the draft 1, 2 and 4 s."""
    answers = []
    for run, seconds in enumerate((1.0, 2.0, 4.0)):
        for question, accepted in ((1, [2, 0, 1, 0]), (2, [1, 1, 1, 0])):
            departure = Departure(0, 3, 0.25) if question == 2 and run == 1 else None
            answers.append(answer(PLAIN, question, run, tokens=8))
            answers.append(answer(EAGLE3, question, run, accepted=[0] * 7))
            answers.append(answer(CONFU, question, run, seconds, accepted, departure=departure))
    return comparison_of(*answers)


def row_of(table, label):
    (row,) = [row for row in table.rows if row[0] == label]
    return dict(zip(table.columns, row, strict=True))


def test_speed_and_tau_are_quotients_of_sums(small):
    row = row_of(speed_table(small), "ConFu, C = 4, N = 8")
    assert row["tau"].value == 14 / 8  # 7 tokens in 4 rounds, twice
    assert (row["tokens/s"].median, row["tokens/s"].low, row["tokens/s"].high) == (4.0, 2.0, 8.0)
    # 48 tokens in 14 seconds against 48 in 12.
    assert row["speed-up, total"].value == pytest.approx(12 / 14)
    assert (row["total by run"].median, row["total by run"].low, row["total by run"].high) == (1.0, 0.5, 2.0)
    assert row["speed-up, mean"].value == pytest.approx(12 / 14)
    assert row["identical"] == "5/6"
    assert row_of(speed_table(small), "plain generate")["speed-up, total"].value == 1


def test_mean_of_ratios_is_not_the_total():
    small = comparison_of(
        answer(PLAIN, 1, seconds=4.0, tokens=8),
        answer(CONFU, 1, seconds=1.0, accepted=[1, 1, 1, 0]),
        answer(PLAIN, 2, seconds=1.0, tokens=2),
        answer(CONFU, 2, seconds=1.0, accepted=[0]),
    )
    arm = small.arms[CONFU]
    assert small.speedup_total(arm).value == pytest.approx((10 / 2) / (10 / 5))
    assert small.speedup_mean(arm).value == pytest.approx((4 + 1) / 2)
    assert small.tau(arm).value == pytest.approx((7 + 1) / (4 + 1))  # rounds count alike, not questions


def test_depths_count_rounds(small):
    rows = [row for row in depth_table(small).rows if row[0] == "ConFu, C = 4, N = 8"]
    # Of 8 rounds a run, 5 accepted one or more and 1 accepted two.
    assert rows[0][2:] == [5 / 8, 1 / 8]
    assert rows[1][2:] == [5 / 8, 1 / 5]
    assert rows[2][1:] == ["of 24 rounds", 15, 3]
    assert [row for row in depth_table(small).rows if row[0] == "EAGLE-3 mode, N = 8"][0][2:] == [0.0, 0.0]


def test_differences_are_against_eagle3_mode_of_the_same_tree(small):
    table = difference_table(small)
    assert [row[:2] for row in table.rows] == [["ConFu, C = 4, N = 8", "EAGLE-3 mode, N = 8"]]
    row = row_of(table, "ConFu, C = 4, N = 8")
    assert row["tau, difference"].value == pytest.approx(14 / 8 - 1)
    assert row["speed, quotient"].value == pytest.approx(12 / 14)
    assert row["speed-up, difference"].value == pytest.approx(12 / 14 - 12 / 12)


def test_every_eagle3_arm_is_a_reference_and_every_pair_is_there_once():
    other = Arm("draft", "e", 8, 4, 2, 0)
    answers = [answer(arm, 1, accepted=[1]) for arm in (EAGLE3, CONFU, other)]
    table = difference_table(comparison_of(answer(PLAIN, 1, tokens=3), *answers))
    assert len(table.rows) == 3  # ConFu against both, and the two against each other


def test_figures_by_group_are_those_of_its_questions():
    comparison = many()
    members = comparison.groups["rag"]
    confu = comparison.arms[CONFU]
    for name, figure, expected in (
        ("speed-up", comparison.speedup_total, confu.tokens[members].sum() / confu.seconds[members].sum() / (40 / 2)),
        ("rate", comparison.tokens_per_second, confu.tokens[members].sum() / confu.seconds[members].sum()),
        ("mean", comparison.speedup_mean, (confu.tokens[members] / confu.seconds[members] / (40 / 2)).mean()),
    ):
        row = row_of(group_table(comparison, name, name, figure), CONFU.label)
        assert row["rag"].value == pytest.approx(expected)
    depths = {(label, group): survival for label, group, *survival in group_depth_table(comparison).rows}
    counts = [count for index in members for count in confu.answers[index][0].turns[0].rounds.accepted]
    assert depths[CONFU.label, "rag"][1] == pytest.approx(sum(count >= 2 for count in counts) / len(counts))


def test_time_is_split_by_part(small):
    row = row_of(time_table(small), "ConFu, C = 4, N = 8")
    assert [row[name] for name in ("draft", "target forward", "walk", "compaction")] == pytest.approx([30, 50, 10, 5])
    assert row["rest"] == pytest.approx(5)  # 0.1 s a round less its parts
    assert row["round"] == pytest.approx(100)
    assert row["prefill"] == pytest.approx(1000 * (7 / 3 - 0.4))


def test_memory_and_rows(small):
    row = row_of(rows_table(small), "ConFu, C = 4, N = 8")
    assert (row["nodes"], row["contemplate rows"]) == (8, 4)
    assert (row["target KV"], row["draft KV"], row["peak"]) == (1, 0.25, 3)
    assert row["transient KV"] == 0.5 + 4 / 2**20


def test_departures_are_counted(small):
    row = row_of(exactness_table(small), "ConFu, C = 4, N = 8")
    assert (row["answers"], row["identical"], row["position"], row["gap, largest"]) == (6, 5, 3, 0.25)
    assert row["above 1e-4"] is None  # bf16 promises no such thing
    fp32 = Setting("float32", 0.0, 16)
    answers = [answer(PLAIN, 1, tokens=2, setting=fp32)]
    answers.append(answer(CONFU, 1, accepted=[0], setting=fp32, departure=Departure(0, 1, 0.25)))
    assert row_of(exactness_table(Comparison(fp32, answers)), "ConFu, C = 4, N = 8")["above 1e-4"] == 1
    answers[-1].departure = Departure(0, 1, None)  # ends where the other goes on, which no rounding explains
    assert row_of(exactness_table(Comparison(fp32, answers)), "ConFu, C = 4, N = 8")["above 1e-4"] == 1
    assert exactness_sentence(Comparison(fp32, answers)).endswith("token for token; 1 end elsewhere.")
    sampled = Setting("float32", 1.0, 16)
    for one in answers:
        one.setting = sampled
    comparison = Comparison(sampled, answers)
    texts = exactness_table(comparison)
    assert row_of(texts, "ConFu, C = 4, N = 8")["above 1e-4"] is None  # there is no gap to tell it by
    for table in (texts, speed_table(comparison), overview_table([comparison])):
        assert "When sampling, prompt lookup and assistant models draw along their own way" in table.note


def test_extra_cost_is_shared_by_the_tokens_of_a_round(small):
    per_round = {
        "rows": 0.004,
        "slots": 0.001,
        "contemplate_experts": 0.0005,
        "future_experts": 0.0005,
        "projections": 0.002,
    }
    cost = {"kind": "cost", "dtype": "bfloat16", "label": "ConFu, C = 4, N = 8", "context": 9, "per_round": per_round}
    rows = {part: figures for _, part, *figures in extra_cost_table(small, [cost]).rows}
    assert rows["contemplate rows"] == pytest.approx([4, *(4 / emitted for emitted in range(1, 9))])
    assert [rows[part][0] for part in ("soft-prompt slots", "experts of [con]", "experts of [f]")] == [1, 0.5, 0.5]
    assert rows["projections of f"][:3] == pytest.approx([2, 2, 1])
    assert rows["sum"] == pytest.approx([8, *(8 / emitted for emitted in range(1, 9))])
    assert rows["in the answers"][0] == pytest.approx(1000 * (0.1 - 0.1))
    assert extra_cost_table(small, [cost | {"dtype": "float32"}]) is None


def test_only_runs_that_every_arm_finished_count():
    answers = [answer(arm, q, run, accepted=[1]) for run in (0, 1) for q in (1, 2) for arm in (PLAIN, CONFU)]
    part = comparison_of(*answers[:-1])
    assert part.runs == [0] and part.questions == ["1", "2"]
    first = comparison_of(*answers[:3])  # nothing is complete: what both arms have
    assert (first.runs, first.questions) == ([0], ["1"])
    assert settings_of(answers) == [SETTING]


def many(seed=0, questions=120):
    """Two arms with normal taus and times; questions differ more than arms do."""
    rng = random.Random(seed)
    answers = []
    for number in range(questions):
        hard = rng.uniform(0.5, 3.0)
        group = "qa" if number % 2 else "rag"
        answers.append(answer(PLAIN, number, tokens=40, seconds=2.0, group=group))
        for arm, better in ((EAGLE3, 0.0), (CONFU, 0.2)):
            accepted = [max(0, round(rng.gauss(hard + better, 1))) for _ in range(30)]
            answers.append(answer(arm, number, seconds=rng.uniform(1.0, 1.2), accepted=accepted, group=group))
    return comparison_of(*answers)


def test_intervals_are_those_of_large_samples():
    comparison = many()
    arm, other = comparison.arms[CONFU], comparison.arms[EAGLE3]
    mean = arm.emitted[:, 0] / 30  # all texts have 30 rounds, so tau is a mean over questions
    # Stratified: the spread within groups, not between them.
    within = np.concatenate([mean[members] - mean[members].mean() for members in comparison.groups.values()])
    error = within.std() / math.sqrt(len(mean))
    interval = comparison.tau(arm)
    assert interval.value == pytest.approx(mean.mean())
    assert (interval.high - interval.low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    # Paired: the difference is much better known than either.
    paired = comparison.tau_difference(arm, other)
    difference = mean - other.emitted[:, 0] / 30
    assert paired.value == pytest.approx(difference.mean())
    assert (paired.high - paired.low) / 2 == pytest.approx(1.96 * difference.std() / math.sqrt(120), rel=0.12)
    assert paired.high - paired.low < (interval.high - interval.low) / 2
    same = comparison.tau_difference(arm, arm)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    assert many().tau(many().arms[CONFU]) == interval  # the seed makes it repeatable


def test_groups_are_measured_by_themselves():
    comparison = many()
    members = comparison.groups["rag"]
    arm = comparison.arms[CONFU]
    inside = comparison.tau(arm, members)
    assert inside.value == arm.emitted[members].sum() / arm.rounds[members].sum()
    assert inside.low < inside.value < inside.high
    assert arm.acceptance(members)["tau"] == inside.value


def test_differences_by_group_are_those_of_the_groups_alone():
    comparison = many()
    (row,) = group_difference_table(comparison).rows
    assert row[:2] == [CONFU.label, EAGLE3.label]
    confu, eagle3 = comparison.arms[CONFU], comparison.arms[EAGLE3]
    for found, members in zip(row[2:-1], comparison.groups.values(), strict=True):
        means = [arm.emitted[members].sum() / arm.rounds[members].sum() for arm in (confu, eagle3)]
        assert found.value == pytest.approx(means[0] - means[1])
        assert found.low < found.value < found.high
    assert row[-1] == comparison.tau_difference(confu, eagle3)


def test_one_question_a_group_has_no_interval():
    comparison = comparison_of(answer(PLAIN, 1, tokens=3), answer(CONFU, 1, accepted=[1]))
    interval = comparison.tau(comparison.arms[CONFU])
    assert interval.value == 2 and math.isnan(interval.low)
    assert "2.00 |" in speed_table(comparison).markdown()


def test_tables_are_markdown_and_csv_of_the_same_figures(small):
    for table in tables_of(small, []):
        lines = table.markdown().splitlines()
        assert len(lines) == 2 + len(table.rows)
        assert {line.count("|") for line in lines} == {len(table.columns) + 1}
        rows = list(csv.reader(io.StringIO(table.csv())))
        assert len(rows) == 1 + len(table.rows) and {len(row) for row in rows} == {len(rows[0])}
    rows = list(csv.DictReader(io.StringIO(speed_table(small).csv())))
    assert float(rows[2]["speed-up, total"]) == pytest.approx(12 / 14)
    assert float(rows[2]["total by run, lowest run"]) == 0.5
    assert float(rows[2]["tau, 95 % low"]) <= 14 / 8 <= float(rows[2]["tau, 95 % high"])
