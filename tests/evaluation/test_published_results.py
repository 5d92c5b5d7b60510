"""docs/results.md and docs/experiment.md are what the records beside them give."""

import re
from pathlib import Path

import pytest

from transformers_confu import cli
from transformers_confu.evaluation.aggregation import ArmAnswers, Comparison, Interval, settings_of
from transformers_confu.evaluation.records import RecordFile


DOCS = Path(__file__).parents[2] / "docs"
SECOND_ARMS = {
    "a": "(a) EAGLE-3 continued, seed 0",
    "a-seed1": "(a) seed 1",
    "b": "(b) ConFu, seed 0",
    "b-seed1": "(b) seed 1",
    "b-eagle": "(b) seed 0 in EAGLE-3 mode (C = 0)",
    "c": "(c) without mixtures",
    "d": "(d) without replication",
    "e": "(e) neither",
}


@pytest.mark.slow
def test_the_page_is_what_its_records_give(tmp_path):
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    names = re.findall(r"^\*\*(.+\.jsonl)\*\*$", page, re.MULTILINE)
    assert names
    (tmp_path / "results.md").write_text(page, encoding="utf-8")  # what stands above the mark is kept
    records = [str(DOCS / "results" / "records" / f"{name}.gz") for name in names]
    assert cli.main(["report", *records, "--output", str(tmp_path / "results.md")]) == 0
    assert (tmp_path / "results.md").read_text(encoding="utf-8") == page
    pictures = {DOCS / picture for picture in re.findall(r"!\[.*\]\((.*)\)", page)}
    assert pictures == set((DOCS / "results").glob("*.png"))


def cell(figure: Interval, digits: int) -> str:
    return f"{figure.value:.{digits}f} ({figure.low:.{digits}f} to {figure.high:.{digits}f})"


def texts(arm: ArmAnswers) -> list[list[int]]:
    return [turn.token_ids for answer in arm.all for turn in answer.turns]


def records_on(page: str, name: str) -> RecordFile:
    records = RecordFile(DOCS / "experiment" / "records" / f"{name}.jsonl.gz")
    assert records.sha256()[:16] in page
    return records


def test_the_experiments_second_decoding_is_what_its_records_give():
    page = (DOCS / "experiment.md").read_text(encoding="utf-8")
    records = records_on(page, "arms_cpu")
    (setting,) = settings_of(records.answers)
    comparison = Comparison(setting, records.answers)
    assert len(comparison.groups) == 6
    arms = {arm.arm.draft: arm for arm in comparison.drafted()}
    # In fp32 every arm writes what plain `generate` does.
    assert all(texts(arm) == texts(comparison.plain) for arm in arms.values())
    for name, title in SECOND_ARMS.items():
        others = [cell(comparison.tau_difference(arms[name], arms[other]), 3) for other in ("a", "a-seed1")]
        others = ["" if name == other else text for other, text in zip(("a", "a-seed1"), others, strict=True)]
        row = " | ".join([f"| {title}", cell(comparison.tau(arms[name]), 2), *others]).replace("|  |", "| |")
        assert row in page
        if name != "a":
            members = comparison.groups.values()
            by_group = [cell(comparison.tau_difference(arms[name], arms["a"], group), 2) for group in members]
            assert " | ".join([f"| {title}", *by_group]) in page


@pytest.mark.parametrize(
    ("name", "temperature", "tree_size", "contemplation"),
    [
        ("arms_cpu_settings", 0.7, 30, 4),
        ("arms_cpu_settings", 1.0, 30, 4),
        ("arms_cpu_settings", 0.0, 16, 4),
        ("arms_cpu_settings", 0.0, 60, 4),
        ("arms_cpu_full", 0.0, 30, 30),
    ],
)
def test_the_experiments_other_settings_are_what_their_records_give(name, temperature, tree_size, contemplation):
    page = (DOCS / "experiment.md").read_text(encoding="utf-8")
    answers = records_on(page, name).answers
    (setting,) = [setting for setting in settings_of(answers) if setting.temperature == temperature]
    comparison = Comparison(setting, answers)
    (eagle3,) = [arm for arm in comparison.drafted() if (arm.arm.draft, arm.arm.tree_size) == ("a-seed1", tree_size)]
    (confu,) = [
        arm for arm in comparison.drafted() if (arm.arm.tree_size, arm.arm.contemplation) == (tree_size, contemplation)
    ]
    assert texts(eagle3) == texts(confu) == texts(comparison.plain)
    figures = [cell(comparison.tau(eagle3), 2), cell(comparison.tau(confu), 2)]
    figures.append(cell(comparison.tau_difference(confu, eagle3), 3))
    rows = "N" if contemplation == tree_size else contemplation
    assert f"| {temperature:g} | {tree_size} | {rows} | {' | '.join(figures)} |" in page
