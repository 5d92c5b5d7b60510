"""docs/results.md is what the records beside it give."""

import re
from pathlib import Path

import pytest

from transformers_confu import cli


DOCS = Path(__file__).parents[2] / "docs"


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
