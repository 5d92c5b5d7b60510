"""Figures on their way from records into the card of a draft."""

from pathlib import Path

import pytest
import yaml

from transformers_confu import cli
from transformers_confu.evaluation import report
from transformers_confu.evaluation.figures import comparisons_of
from transformers_confu.evaluation.records import RecordFile
from transformers_confu.publishing.model_card import CARD_FILE, CardFacts


def test_a_report_hands_its_figures_to_the_draft(options, tmp_path, monkeypatch, tiny_folders):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "draw", lambda *data, **options: None)  # pictures take their time
    another = options | {
        "drafts": [f"mine={tiny_folders['draft']}", f"theirs={tiny_folders['draft']}"],
        "baselines": ["plain"],
    }
    Path("run.yaml").write_text(yaml.safe_dump(another | {"output": "run.jsonl", "contemplations": ["0", "3"]}))
    assert cli.main(["evaluate", "run.yaml"]) == 0
    CardFacts(license="mit").save(Path("mine").mkdir() or Path("mine", CARD_FILE))
    for _ in range(2):  # the same records once more change nothing
        assert cli.main(["report", "run.jsonl", "--output", "out", "--card", "mine"]) == 0
    facts = CardFacts.load(Path("mine", CARD_FILE))
    (evaluation,) = facts.evaluations
    assert facts.license == "mit" and "4 questions, float64, T = 0, up to 12 tokens; on cpu (" in evaluation.setting
    rows = {row.pop("arm"): row for row in evaluation.rows}
    # From the raw records: tokens that rounds emitted over rounds, and total tokens over total time.
    file = RecordFile("run.jsonl")
    (comparison,) = comparisons_of([file])
    for name, arm in comparison.arms.items():
        if arm.kind == "plain":
            assert name not in rows
            continue
        of_arm = [turn for _, a in file.answers if a["arm"] == vars(arm) for turn in a["turns"]]
        plain = [turn for _, a in file.answers if a["arm"]["kind"] == "plain" for turn in a["turns"]]
        rate, plain_rate = (
            sum(len(turn["token_ids"]) for turn in turns) / sum(turn["seconds"] for turn in turns)
            for turns in (of_arm, plain)
        )
        emitted = [count for turn in of_arm for count in turn["rounds"]["emitted"]]
        assert rows[name]["tau"] == round(sum(emitted) / len(emitted), 3)
        assert rows[name]["speed_up"] == round(rate / plain_rate, 3)
        assert rows[name].get("others", False) == (arm.draft != "mine")
        assert rows[name].get("contemplation") == arm.contemplation
    Path("stranger").mkdir()
    with pytest.raises(ValueError, match="measured the drafts mine, theirs, not stranger"):
        cli.main(["--traceback", "report", "run.jsonl", "--output", "out", "--card", "stranger"])
