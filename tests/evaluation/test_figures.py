"""Figures from records made by hand, against sums made by hand and against the law of large numbers."""

import json
import math
import random
from dataclasses import asdict

import numpy as np
import pytest

from transformers_confu.evaluation import plots, tables
from transformers_confu.evaluation.arms import Arm, Setting
from transformers_confu.evaluation.figures import Comparison, Interval
from transformers_confu.evaluation.records import RecordFile
from transformers_confu.evaluation.report import conclusion


SETTING = Setting("bfloat16", 0.0, 16)
PLAIN = Arm("plain")
EAGLE3 = Arm("draft", "d", 8, 4, 2, 0)
CONFU = Arm("draft", "d", 8, 4, 2, 4)
PLAIN_NAME, EAGLE3_NAME, CONFU_NAME = "plain generate", "EAGLE-3 mode, N = 8", "ConFu, C = 4, N = 8"


def answer(arm, seconds=2.0, accepted=(), tokens=None, departure=None):
    """One turn; each round emits what it accepted and one token, and takes 0.1 s, half of it in the target."""
    accepted, rounds = list(accepted), None
    tokens = tokens or 1 + sum(accepted) + len(accepted)
    if arm.kind == "draft":
        count = len(accepted)
        parts = {"draft": 0.03, "target": 0.05, "walk": 0.01, "compaction": 0.005}
        rounds = {
            "emitted": [a + 1 for a in accepted],
            "accepted": accepted,
            "tree_nodes": 8 * count,
            "contemplate_rows": arm.contemplation * count,
            "seconds": {name: value * count for name, value in parts.items()} | {"prefill": seconds - 0.1 * count},
            "target_cache_bytes": 2**20,
            "draft_cache_bytes": 2**18,
            "transient_cache_bytes": 2**19 + arm.contemplation,
        }
    turn = {"prompt_tokens": 5, "token_ids": list(range(tokens)), "seconds": seconds, "rounds": rounds}
    turns = [turn | {"peak_memory_bytes": 3 * 2**20}]
    return {"arm": asdict(arm), "order": 0, "turns": turns, "skipped_turns": 0, "departure": departure}


def unit(question, *answers, run=0, group="qa", setting=SETTING):
    row = {"kind": "unit", "run": run, "setting": asdict(setting), "question_id": str(question), "category": group}
    return row | {"group": group, "answers": list(answers)}


@pytest.fixture
def compare(tmp_path):
    """Writes units to a file and compares the arms in it."""

    def compare(*units, setting=SETTING, costs=()):
        path = tmp_path / "records.jsonl"
        rows = [{"kind": "settings", "prompt_lookup_tokens": 10}, *units, *costs]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Comparison(RecordFile(path), setting)

    return compare


@pytest.fixture
def small(compare):
    """Two questions, three runs: plain takes 2 s for 8 tokens; the draft 1, 2 and 4 s."""
    units = []
    for run, seconds in enumerate((1.0, 2.0, 4.0)):
        for question, accepted in ((1, [2, 0, 1, 0]), (2, [1, 1, 1, 0])):
            departure = {"turn": 0, "position": 3, "gap": 0.25} if question == 2 and run == 1 else None
            confu = answer(CONFU, seconds, accepted, departure=departure)
            units.append(unit(question, answer(PLAIN, tokens=8), answer(EAGLE3, accepted=[0] * 7), confu, run=run))
    return compare(*units)


def row_of(table, arm, **others):
    (row,) = [row for row in table.rows if row["arm"] == arm and others.items() <= row.items()]
    return row


def test_speed_and_tau_are_quotients_of_sums(small):
    row = row_of(tables.speed_table([small]), CONFU_NAME)
    assert row["tau"].value == 14 / 8  # 7 tokens in 4 rounds, twice
    assert (row["tokens/s"], row["tokens/s by run"]) == (4.0, "2.00 to 8.00")
    assert row["speed-up"].value == pytest.approx(12 / 14)  # 48 tokens in 14 seconds against 48 in 12
    assert row["by run"] == "0.50 to 2.00"
    assert row["mean of ratios"].value == pytest.approx(12 / 14)
    assert row["equal"] == "5/6"
    assert (row["N"], row["depth"], row["branching"]) == (8, 4, 2)
    plain = row_of(tables.speed_table([small]), PLAIN_NAME)
    assert f"{plain['speed-up']:.2f} {plain['tau']:.2f}" == "1.00 1.00"


def test_mean_of_ratios_is_not_the_total(compare):
    small = compare(
        unit(1, answer(PLAIN, 4.0, tokens=8), answer(CONFU, 1.0, accepted=[1, 1, 1, 0])),
        unit(2, answer(PLAIN, 1.0, tokens=2), answer(CONFU, 1.0, accepted=[0])),
    )
    assert small.speedup_total()[CONFU_NAME][0] == pytest.approx((10 / 2) / (10 / 5))
    assert small.speedup_mean()[CONFU_NAME][0] == pytest.approx((4 + 1) / 2)
    assert small.tau()[CONFU_NAME][0] == pytest.approx((7 + 1) / (4 + 1))  # rounds count alike, not questions


def test_steps_count_rounds_up_to_the_depth_of_the_tree(small):
    table = tables.acceptance_table([small])
    levels = [f"l = {level}" for level in range(1, 5)]

    def line(title):
        row = row_of(table, CONFU_NAME, **{"": title})
        assert row["rounds"] == 24 and "l = 5" not in row
        return [row.get(level) for level in levels]

    # Of 8 rounds a run, 5 accepted one or more and 1 accepted two; the tree is 4 deep.
    assert line("P(accepted >= l)") == [5 / 8, 1 / 8, 0, 0]
    assert line("given l - 1") == [5 / 8, 1 / 5, None, None]
    figure, *_ = plots.survival(small)
    lines = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    assert lines[CONFU_NAME] == [[0, 1], [1, 5 / 8], [2, 1 / 8], [3, 0], [4, 0]]
    plots.pyplot.close(figure)


def test_lines_of_a_sweep_are_told_apart_and_knobs_are_whole_numbers(compare):
    arms = [Arm("draft", "d", 8, depth, 2, 0, lookup) for depth in (6, 7) for lookup in (False, True)]
    answers = [answer(arm, accepted=[1, 2]) for arm in arms]
    figure, *_ = plots.sweep(compare(unit(1, answer(PLAIN), *answers), unit(2, answer(PLAIN), *answers)), "depth")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["without lookup", "with lookup"]
    assert all(float(tick).is_integer() for axes in figure.axes for tick in axes.get_xticks())
    plots.pyplot.close(figure)


def test_differences_are_against_eagle3_mode_of_the_same_tree(small, compare):
    (row,) = tables.difference_table([small]).rows
    assert (row["arm"], row["against"]) == (CONFU_NAME, EAGLE3_NAME)
    assert row["tau, difference"].value == row["tau, qa"].value == pytest.approx(14 / 8 - 1)
    assert row["speed, quotient"].value == pytest.approx(12 / 14)
    arms = [EAGLE3, CONFU, Arm("draft", "e", 8, 4, 2, 0), Arm("draft", "e", 4, 4, 2, 0), Arm("draft", "e", 8, 3, 2, 0)]
    table = tables.difference_table([compare(unit(1, answer(PLAIN), *(answer(arm, accepted=[1]) for arm in arms)))])
    # ConFu against both drafts, and the two against each other, once; no other tree.
    assert len(table.rows) == 3 and all("N = 8, depth 4" in row["against"] for row in table.rows)


def test_time_memory_and_rows(small):
    row = row_of(tables.time_table([small]), CONFU_NAME)
    parts = ["draft", "target", "walk", "compaction", "rest", "round"]
    assert [row[name] for name in parts] == pytest.approx([30, 50, 10, 5, 5, 100])
    assert row["prefill"] == pytest.approx(1000 * (7 / 3 - 0.4))
    row = row_of(tables.memory_table([small]), CONFU_NAME)
    assert (row["nodes"], row["contemplate rows"]) == (8, 4)
    assert (row["target KV"], row["draft KV"], row["peak"]) == (1, 0.25, 3)
    assert row["transient KV"] == 0.5 + 4 / 2**20


def test_departures_are_counted_and_ties_told_from_errors(small, compare):
    row = row_of(tables.exactness_table([small]), CONFU_NAME)
    assert (row["answers"], row["identical"], row["position"], row["gap, largest"]) == (6, 5, 3, 0.25)
    assert "above 0.0001" not in row  # bf16 promises no such thing

    def beyond(setting, gap):
        departure = {"turn": 0, "position": 1, "gap": gap}
        answers = answer(PLAIN, tokens=2), answer(CONFU, accepted=[0], departure=departure)
        comparison = compare(unit(1, *answers, setting=setting), setting=setting)
        return row_of(tables.exactness_table([comparison]), CONFU_NAME).get("above 0.0001")

    assert [beyond(Setting("float32", 0.0, 16), gap) for gap in (0.25, 1e-5, None)] == [1, 0, 1]
    assert beyond(Setting("float32", 1.0, 16), None) is None  # sampling: there is no gap to tell it by


def test_what_contemplation_adds_is_the_difference_of_rounds(compare):
    per_round = {"contemplate_experts": 5e-4, "future_experts": 2e-4, "projections": 2e-3}
    cost = {"kind": "cost", "dtype": "bfloat16", "arm": asdict(CONFU), "per_round": per_round}
    answers = answer(PLAIN), answer(EAGLE3, accepted=[0] * 7), answer(CONFU, accepted=[1] * 7)
    for turn in answers[2]["turns"]:
        turn["seconds"] += 7 * 0.008
        turn["rounds"]["seconds"]["target"] += 7 * 0.006
        turn["rounds"]["seconds"]["draft"] += 7 * 0.002
    (row,) = tables.contemplation_table([compare(unit(1, *answers), costs=[cost])]).rows
    parts = ["a round", "target", "draft", "experts of [con]", "experts of [f]", "projections of f"]
    assert [row[part] for part in parts] == pytest.approx([8, 6, 2, 0.5, 0.2, 2])
    assert row["a token"] == pytest.approx(108 / 2 - 100)
    (other,) = tables.contemplation_table([compare(unit(1, *answers), costs=[cost | {"dtype": "float32"}])]).rows
    assert "experts of [con]" not in other


def test_only_runs_with_all_questions_count(compare):
    def pair(question, run):
        return unit(question, answer(PLAIN, tokens=3), answer(CONFU, accepted=[1]), run=run)

    part = compare(pair(1, 0), pair(2, 0), pair(1, 1))
    assert part.runs == [0] and part.questions == ["1", "2"]
    assert compare(pair(1, 0), pair(2, 0), pair(1, 1), pair(2, 1)).runs == [0, 1]


def test_the_conclusion_names_the_fastest_and_what_to_set(compare):
    def told(confu, eagle3):
        drafted = answer(EAGLE3, eagle3, [1, 1, 1, 0]), answer(CONFU, confu, [1, 1, 1, 0])
        return conclusion(compare(*(unit(question, answer(PLAIN, tokens=8), *drafted) for question in range(20))))

    text = told(1.0, 1.25)
    assert "fastest is **ConFu, C = 4, N = 8**, 2.00 times plain `generate`" in text
    assert "`confu_tree_size=8`, `confu_depth=4`, `confu_branching=2`, `confu_contemplation=4`." in text
    assert "Future predictions (ConFu, C = 4, N = 8) change tau by 0.00, and speed by a factor 1.25" in text
    assert "certainly" not in text
    # 8 tokens in four forwards of 0.05 s and the prefill of 0.6 s, where plain generation takes 2 s.
    assert "Were each of its rounds one forward of the target and nothing else: 2.50." in text
    assert f"Not certainly slower: {CONFU_NAME}." in told(1.0, 1.0)
    assert "nothing was faster than plain `generate` (ConFu, C = 4, N = 8: 0.80 times its speed)" in told(2.5, 4.0)


@pytest.fixture
def many(compare):
    """Two arms with normal taus and times; questions differ more than arms do."""
    rng = random.Random(0)
    units = []
    for number in range(120):
        hard = rng.uniform(0.5, 3.0)
        answers = [answer(PLAIN, tokens=40)]
        for arm, better in ((EAGLE3, 0.0), (CONFU, 0.2)):
            accepted = [max(0, round(rng.gauss(hard + better, 1))) for _ in range(30)]
            answers.append(answer(arm, rng.uniform(1.0, 1.2), accepted))
        units.append(unit(number, *answers, group="qa" if number % 2 else "rag"))
    return compare(*units)


def test_intervals_are_those_of_large_samples(many):
    means = many.emitted / 30  # all texts have 30 rounds, so tau is a mean over questions
    confu, eagle3 = means[CONFU_NAME].to_numpy(), means[EAGLE3_NAME].to_numpy()
    # Stratified: the spread within groups, not between them.
    within = np.concatenate([confu[members] - confu[members].mean() for members in many.groups.values()])
    interval = many.interval(many.tau()[CONFU_NAME])
    assert interval.value == pytest.approx(confu.mean())
    assert (interval.high - interval.low) / 2 == pytest.approx(1.96 * within.std() / math.sqrt(120), rel=0.1)
    # Paired: the difference is much better known than either.
    paired, _ = tables.against(many, CONFU_NAME, EAGLE3_NAME)
    difference = confu - eagle3
    assert paired.value == pytest.approx(difference.mean())
    assert (paired.high - paired.low) / 2 == pytest.approx(1.96 * difference.std() / math.sqrt(120), rel=0.12)
    assert paired.high - paired.low < (interval.high - interval.low) / 2
    again = Comparison(many.file, SETTING)
    assert again.interval(again.tau()[CONFU_NAME]) == interval  # the seed makes it repeatable


def test_groups_are_measured_by_themselves(many):
    members = many.groups["rag"]
    tokens, seconds = many.tokens[CONFU_NAME].to_numpy()[members], many.seconds[CONFU_NAME].to_numpy()[members]
    table = tables.group_table([many])
    for figure, expected in {
        "tau": many.emitted[CONFU_NAME].iloc[members].sum() / many.rounds[CONFU_NAME].iloc[members].sum(),
        "speed-up, total": tokens.sum() / seconds.sum() / (40 / 2),
        "speed-up, mean": (tokens / seconds / (40 / 2)).mean(),
    }.items():
        cell = row_of(table, CONFU_NAME, figure=figure)["rag"]
        assert cell.value == pytest.approx(expected) and cell.low < cell.value < cell.high
        assert cell.questions == 60


def test_intervals_of_few_questions_are_marked_and_one_question_has_none(compare):
    assert f"{Interval(1.234, 1.0, 1.5, 10):.2f}" == "1.23 (1.00 to 1.50)"
    assert f"{Interval(1.234, 1.0, 1.5, 9):.2f}" == "1.23 (1.00 to 1.50)*"
    comparison = compare(unit(1, answer(PLAIN, tokens=3), answer(CONFU, accepted=[1])))
    interval = comparison.interval(comparison.tau()[CONFU_NAME])
    assert interval.value == 2 and math.isnan(interval.low) and f"{interval:.2f}" == "2.00"
