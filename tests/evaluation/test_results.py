"""The page on several measurements, made by the commands as users run them."""

import gzip
import json
import re
from hashlib import sha256
from pathlib import Path

import pytest
import yaml

from transformers_confu import cli
from transformers_confu.evaluation.results import MARK


CHANGES = {
    "base": {"dtypes": ["bfloat16"]},
    "trees": {"dtypes": ["bfloat16"], "tree_sizes": [8, 4], "contemplations": ["0"], "runs": 1},
    "exact": {"runs": 1},
    "fewer": {"dtypes": ["bfloat16"], "num_per_group": 1, "contemplations": ["0"], "runs": 1},
}


@pytest.fixture
def measured(options, tmp_path, monkeypatch):
    """Files of records: two runs, other trees with the first's once more, full precision, fewer questions."""
    monkeypatch.chdir(tmp_path)

    def measure(*names: str) -> list[str]:
        for name in names:
            settings = options | {"max_turns": 1, "output": f"{name}.jsonl"} | CHANGES[name]
            Path(f"{name}.yaml").write_text(yaml.safe_dump(settings))
            assert cli.main(["evaluate", f"{name}.yaml"]) == 0
        return [f"{name}.jsonl" for name in names]

    return measure


def table(page: str, title: str) -> list[list[str]]:
    """The rows of a table, without its head."""
    lines = page.replace("\u00a0", " ").split(f"### {title}\n\n")[1].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def answers(name: str, label: str, runs: tuple[int, ...] = (0, 1)) -> list[dict]:
    rows = [json.loads(line) for line in Path(name).read_text().splitlines()]
    return [row for row in rows if row["kind"] == "answer" and row["label"] == label and row["run"] in runs]


def test_the_page_shows_every_arm_once_and_how_it_was_measured(measured, capsys):
    measurements = measured("base", "trees", "exact", "fewer")
    assert cli.main(["report", *measurements, "--output", "docs/results.md"]) == 0
    assert capsys.readouterr().out.endswith("docs/results.md\n")
    page = Path("docs/results.md").read_text()
    assert page.startswith(f"# Results\n\n{MARK}\n\n## 4 questions, bfloat16, up to 12 tokens\n")

    rows = table(page, "One factor at a time")
    assert [row[:3] for row in rows] == [
        ["0", "", "plain generate"],
        ["0", "", "prompt lookup"],
        ["0", "8", "EAGLE-3 mode"],
        ["0", "8", "ConFu, C = 3"],
        ["0", "8", "ConFu, C = N"],
        ["0", "4", "EAGLE-3 mode"],  # of the second file, without what the first has
    ]
    emitted = [
        rounds
        for answer in answers("base.jsonl", "ConFu, C = 3, N = 8")
        for turn in answer["turns"]
        for rounds in turn["rounds"]["emitted"]
    ]
    assert rows[3][3].startswith(f"{sum(emitted) / len(emitted):.2f} (")
    own = [
        rounds
        for answer in answers("base.jsonl", "EAGLE-3 mode, N = 8")
        for turn in answer["turns"]
        for rounds in turn["rounds"]["emitted"]
    ]
    assert float(rows[3][4].split(" (")[0]) == pytest.approx(
        sum(emitted) / len(emitted) - sum(own) / len(own), abs=0.0051
    )
    speeds = []
    for run in (0, 1):
        rates = []
        for label in ("ConFu, C = 3, N = 8", "plain generate"):
            turns = [turn for answer in answers("base.jsonl", label, (run,)) for turn in answer["turns"]]
            rates.append(sum(len(turn["token_ids"]) for turn in turns) / sum(turn["seconds"] for turn in turns))
        speeds.append(rates[0] / rates[1])
    assert rows[3][7] == f"{min(speeds):.2f} to {max(speeds):.2f}"
    assert rows[5][7] == ""  # one run
    depths = table(page, "Acceptance by draft step")
    assert [row[1] for row in depths[:3]] == ["P(accepted >= l)", "given l - 1", f"of {len(own):,} rounds"]
    accepted = [
        count
        for answer in answers("base.jsonl", "EAGLE-3 mode, N = 8")
        for turn in answer["turns"]
        for count in turn["rounds"]["accepted"]
    ]
    reached = [sum(count >= level for count in accepted) for level in range(1, max(accepted) + 1)]
    assert [int(cell) for cell in depths[2][2:]][: len(reached)] == reached
    assert rows[0][-1] == "8/8" and rows[5][-1].endswith("/4")

    # In fp64 all is as plain generate's.
    assert "float64, T = 0, up to 12 tokens: 12 of 12 answers (4 questions, 3 arms with a draft) are plain" in page
    for name in measurements:
        digest = sha256(Path(name).read_bytes()).hexdigest()
        assert f"Records: {name}, {len(Path(name).read_text().splitlines()) - 1} answers, SHA-256 {digest}." in page
        assert f"```\nconfu evaluate {Path(name).stem}.yaml\n\n# {Path(name).stem}.yaml\n" in page
    pictures = re.findall(r"!\[.*\]\((.*)\)", page)
    assert [Path(picture).stem for picture in pictures] == [
        "4_questions_survival",
        "4_questions_speedup_by_group",
        "4_questions_round_costs",
        "4_questions_sizes",  # which only the second file has
        "4_questions_budgets",
        "2_questions_speedup_by_group",
    ]
    fewer = page.split("## 2 questions, bfloat16, up to 12 tokens")[1]
    assert [row[2] for row in table(fewer, "Accepted length and speed")] == [
        "plain generate",
        "prompt lookup",
        "EAGLE-3 mode",
    ]
    assert {Path("docs", picture) for picture in pictures} == set(Path("docs/results").iterdir())
    assert sum(path.stat().st_size for path in Path("docs/results").iterdir()) < 1_000_000


def test_full_precision_is_shown_in_detail_where_nothing_else_was_measured(measured):
    (records,) = measured("exact")
    assert cli.main(["report", records, "--output", "results.md"]) == 0
    page = Path("results.md").read_text()
    assert "## 4 questions, float64, up to 12 tokens" in page
    assert [row[-1] for row in table(page, "Accepted length and speed")] == ["4/4"] * 5
    assert "float64, T = 0, up to 12 tokens: 12 of 12 answers (4 questions, 3 arms with a draft) are plain" in page
    assert "In half precision" not in page


def test_text_above_the_mark_is_kept_and_other_files_are_not_touched(measured, capsys):
    (records,) = measured("base")
    output = Path("results.md")
    command = ["report", records, "--output", str(output)]
    assert cli.main(command) == 0
    first = output.read_text()
    output.write_text(first.replace("# Results\n", "# Results\n\nThey are good.\n"))
    assert cli.main(command) == 0
    assert output.read_text() == first.replace("# Results\n", "# Results\n\nThey are good.\n")

    output.write_text("Something else.\n")
    assert cli.main(command) == 1
    assert "results.md has no line" in capsys.readouterr().err
    assert output.read_text() == "Something else.\n"
    for arguments, sentence in (
        (["nothing.jsonl", "--output", "new.md"], "nothing.jsonl: No such file or directory"),
        ([records, "--output", "new.html"], "The output is new.html; expected a .md file."),
        (["base.yaml", "--output", "new.md"], "base.yaml, line 1"),
        (["empty.jsonl", "--output", "new.md"], "empty.jsonl holds no answers yet; run its `confu evaluate` first."),
    ):
        Path("empty.jsonl").write_text(Path(records).read_text().splitlines()[0] + "\n")
        assert cli.main(["report", *arguments]) == 1
        assert sentence in capsys.readouterr().err
    assert not list(Path().glob("new*"))


def test_an_unfinished_measurement_is_read_as_it_is(measured):
    (records,) = measured("base")
    lines = Path(records).read_text().splitlines(keepends=True)
    cut = "".join(lines[:-2]) + lines[-2][:40]  # while the last question of the second run was written
    Path("cut.jsonl").write_text(cut)
    assert cli.main(["report", "cut.jsonl", "--output", "results.md"]) == 0
    assert Path("cut.jsonl").read_text() == cut
    assert [row[-1] for row in table(Path("results.md").read_text(), "Accepted length and speed")][0] == "4/4"


def test_compressed_records_give_the_same_page(measured, capsys):
    (records,) = measured("base")
    Path("base.jsonl.gz").write_bytes(gzip.compress(Path(records).read_bytes()))
    for folder, source in (("plain", records), ("compressed", "base.jsonl.gz")):
        assert cli.main(["report", source, "--output", f"{folder}/results.md"]) == 0
    assert Path("compressed/results.md").read_text() == Path("plain/results.md").read_text()

    Path("base.jsonl.gz").write_bytes(gzip.compress(Path(records).read_bytes())[:-50])
    assert cli.main(["report", "base.jsonl.gz", "--output", "torn.md"]) == 1
    assert "base.jsonl.gz cannot be decompressed after line" in capsys.readouterr().err
    assert not Path("torn.md").exists()
