"""The arms of docs/experiment.md against their records."""

import gzip
import json
from pathlib import Path

import numpy as np


DOCS = Path(__file__).parents[2] / "docs"


def test_the_published_arms_are_what_their_records_give():
    """Recomputed from counts of each answer: rows of a step, those right so far, chances to be accepted so far."""
    lines = (DOCS / "experiment.md").read_text(encoding="utf-8").splitlines()
    rounds = json.loads(gzip.open(DOCS / "experiment" / "recipes.json.gz").read())
    shown = 0
    for number_of_steps, arms in ((4, rounds["new drafts"]), (6, rounds["from the shipped draft"])):
        for arm, answers in arms.items():
            counted, *others = np.array(list(answers.values())).sum(axis=0)[:, :number_of_steps]
            (line,) = (line for line in lines if line.startswith(f"| {arm} |"))
            taus = [f"{1 + (so_far / counted).sum():.3f}" for so_far in others]
            assert f"| {taus[0]} |" in line and (number_of_steps == 6 or f"| {taus[1]} |" in line), arm
            shown += 1
    assert shown == 14
    at_zero, at_one = rounds["large steps, decoded"].values()
    for arm in at_zero:
        sums = (np.array(list(of[arm].values())).sum(axis=0) for of in (at_zero, at_one))
        assert f"| {arm} | {' | '.join(f'{emitted / counted:.3f}' for emitted, counted in sums)} |" in lines


def test_the_published_passes_are_what_their_records_give():
    lines = (DOCS / "experiment.md").read_text(encoding="utf-8").splitlines()
    runs = json.loads(gzip.open(DOCS / "experiment" / "passes.json.gz").read())
    for run, name in (("to 0", "falling to 0 over 8"), ("held", "held")):
        _, greedy, probabilistic = zip(*runs[run], strict=True)
        number = next(n for n, line in enumerate(lines) if line.startswith(f"| {name}, `tau_greedy` |"))
        for line, taus in zip(lines[number : number + 2], (greedy, probabilistic), strict=True):
            assert [float(cell) for cell in line.strip("| ").split("|")[1:] if cell.strip()] == list(taus)


def test_the_published_means_are_what_their_records_give():
    lines = (DOCS / "experiment.md").read_text(encoding="utf-8").splitlines()
    arms = json.loads(gzip.open(DOCS / "experiment" / "averages.json.gz").read())
    for arm, answers in arms.items():
        counted, *others = np.array(list(answers.values())).sum(axis=0)
        taus = [f"{1 + (so_far / counted).sum():.3f}" for so_far in others]
        (line,) = (line for line in lines if line.startswith(f"| {arm} |"))
        cells = [cell.strip() for cell in line.split("|")]
        assert [cells[2], cells[4]] == taus, arm
    assert len(arms) == 6


def test_the_published_tau_of_both_drafts_is_what_their_records_give():
    lines = (DOCS / "experiment.md").read_text(encoding="utf-8").splitlines()
    shown = 0
    for name in ("both", "both_07", "both_1"):
        sums, questions = {}, 0
        for row in map(json.loads, gzip.open(DOCS / "experiment" / f"{name}.jsonl.gz", "rt", encoding="utf-8")):
            questions += row["kind"] == "unit"
            for answer in row.get("answers", []):
                arm = answer["arm"]
                if arm["kind"] == "draft":
                    assert answer["departure"] is None  # the text is plain generation's
                    counts = [count for turn in answer["turns"] for count in turn["rounds"]["emitted"]]
                    key = (row["setting"]["temperature"], arm["lookup"], arm["draft"])
                    sums[key] = sums.get(key, 0) + np.array([sum(counts), len(counts)])
        for temperature, copies, draft in sums:
            if draft == "now":
                before, now = (np.divide(*sums[temperature, copies, which]) for which in ("before", "now"))
                arm = f"T = {temperature:g}{', with tokens copied from the text' if copies else ''}"
                start = f"| {arm} | {questions} | {before:.3f} | {now:.3f} | {now - before:+.3f} ("
                assert any(line.startswith(start) for line in lines), start
                shown += 1
    assert shown == 4


def test_the_published_forms_are_what_their_records_give():
    """The fourth round: as above, gains at depths 2 to 4, and tau of decoded answers."""
    lines = (DOCS / "experiment.md").read_text(encoding="utf-8").splitlines()
    records = json.loads(gzip.open(DOCS / "experiment" / "forms.json.gz").read())

    def line(arm: str) -> str:
        (found,) = (line for line in lines if line.startswith(f"| {arm} |"))
        return found

    first = None
    for arm, answers in records["teacher-forced"].items():
        counted, correct, accepted = np.array(list(answers.values())).sum(axis=0)
        for so_far in (correct, accepted):
            assert f"| {1 + (so_far / counted).sum():.3f} |" in line(arm), arm
        later = (accepted / counted)[1:4].sum()
        first = later if first is None else first
        assert later == first or f"| {100 * (later / first - 1):+.1f} % (" in line(arm), arm
    for arm, answers in records["decoded"].items():
        emitted, rounds = np.array(list(answers.values())).sum(axis=0)
        assert f"| {emitted / rounds:.3f} |" in line(f"decoded: {arm}"), arm
    assert len(records["teacher-forced"]) == 14 and len(records["decoded"]) == 10
