"""A tiny target, its tokenizer and a draft on disk, and a file of questions: what the command is given."""

import json
from pathlib import Path

import pytest
from questions_and_words import QUESTIONS, tiny_tokenizer

from helpers import make_tiny_draft, make_tiny_target
from transformers_confu.evaluation.arguments import EvaluationArguments
from transformers_confu.evaluation.measure import measure


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory) -> dict[str, Path]:
    """Folders of a target with its tokenizer, and of a draft for it."""
    root = tmp_path_factory.mktemp("models")
    target = make_tiny_target()
    target.save_pretrained(root / "target")
    tiny_tokenizer().save_pretrained(root / "target")
    make_tiny_draft(target).save_pretrained(root / "draft")
    return {"target": root / "target", "draft": root / "draft"}


@pytest.fixture
def options(tiny_folders, tmp_path) -> dict:
    """Options of a small measurement; its records go to a fresh folder."""
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    return {
        "target": str(tiny_folders["target"]),
        "drafts": [str(tiny_folders["draft"])],
        "questions": str(questions),
        "output": str(tmp_path / "records.jsonl"),
        "dtypes": ["float64"],
        "max_new_tokens": [12],
        "tree_sizes": ["8"],
        "contemplations": ["0", "3", "full"],
        "depths": [4],
        "branchings": [2],
        "runs": 1,
        "costs": False,
        "device": "cpu",
    }


RECORDS: list[bytes] = []


@pytest.fixture
def answered(options) -> Path:
    """The records of these options, measured once for all tests."""
    path = Path(options["output"])
    if not RECORDS:
        measure(EvaluationArguments(**options), "confu evaluate run.yaml")
        RECORDS.append(path.read_bytes())
    path.write_bytes(RECORDS[0])
    return path
