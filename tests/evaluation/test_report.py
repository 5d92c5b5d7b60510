"""Pages of a tiny measurement, made by the commands as users run them, and the published page."""

import gzip
import json
import re
from hashlib import sha256
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml

from transformers_confu import cli
from transformers_confu.evaluation import report
from transformers_confu.evaluation.figures import comparisons_of
from transformers_confu.evaluation.records import RecordFile
from transformers_confu.evaluation.report import MARK
from transformers_confu.evaluation.tables import Table
from transformers_confu.publishing.model_card import CARD_FILE, CardFacts


DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def measured(options, tmp_path, monkeypatch):
    """Runs `confu evaluate` on a file of options, in an empty folder; the name of the records."""
    monkeypatch.chdir(tmp_path)

    def measure(name, *argv, **changes):
        settings = options | {"output": f"{name}.jsonl"} | changes
        Path(f"{name}.yaml").write_text(yaml.safe_dump(settings))
        assert cli.main(["evaluate", f"{name}.yaml", *argv]) == 0
        return f"{name}.jsonl"

    return measure


def tables_on(page):
    """Title -> rows of every table on a Markdown page, each a mapping of columns to cells."""
    found = {}
    pattern = r"(?:\*\*|<summary>)([^*<\n]+)(?:\*\*|</summary>)\n\n((?:\|.*\n?)+)"
    for title, table in re.findall(pattern, page):
        head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        found[title] = [dict(zip(head, row, strict=True)) for row in rows]
    return found


def test_one_measurement_gives_pages_of_one_file_each(measured, capsys):
    changes = {"costs": True, "report": "out", "tree_sizes": ["8", "4"], "depths": [4, 2], "num_per_group": 1}
    records = measured("base", "--runs", "2", **changes)  # options behind a file override it
    printed = capsys.readouterr().out
    for said in ("| ConFu, C = 3, N = 8, depth 4 |", "**base (2 questions, float64", "Report: out/report.html"):
        assert said in printed

    page = ElementTree.parse("out/report.html").getroot()  # every tag is closed
    plots = ["speedup_by_group", "tree_size", "depth", "contemplation", "survival", "round_costs", "forward_curve"]
    fetched = ("src", "href", "srcset", "data")
    sources = [value for tag in page.iter() for name, value in tag.items() if name in fetched]
    assert len(sources) == len(plots) and all(source.startswith("data:image/png;base64,") for source in sources)
    text = "".join(page.itertext())
    assert "@import" not in text and "url(" not in text and page.find(".//script") is None
    assert "confu evaluate base.yaml --runs 2" in text and torch.__version__ in text
    assert len(page.findall(".//h2")) == 5 and len(page.findall(".//table")) == 9

    markdown = Path("out/report.md").read_text(encoding="utf-8")
    assert re.findall(r"!\[.*\]\(./(.*).png\)", markdown) == plots
    assert all(Path("out", f"{plot}.png").read_bytes().startswith(b"\x89PNG") for plot in plots)
    # The page begins with its conclusion, and names depth and branching.
    assert markdown.split(MARK)[1].strip().startswith("**base (2 questions, float64, T = 0, up to 12 tokens)**: ")
    rows = tables_on(markdown)["Accepted length and speed of every arm"]
    trees = {(row["N"], row["depth"], row["branching"]) for row in rows if row["arm"].startswith("ConFu")}
    assert trees == {(size, depth, "2") for size in "84" for depth in "42"}
    costs = RecordFile(records).costs
    kinds = [cost["arm"] and (cost["arm"]["tree_size"], cost["arm"]["contemplation"]) for cost in costs]
    assert kinds == [None, *[(8, 3), (8, 8)] * 2, *[(4, 3), (4, 4)] * 2]
    assert all(seconds > 0 for cost in costs for seconds in cost.get("per_round", {}).values())

    # A torn second run is not counted, and to report on it leaves the records as they are.
    cut = Path(records).read_bytes()
    cut = cut[: cut.rindex(b'{"kind": "unit"') + 500]
    Path(records).write_bytes(cut)
    (comparison,) = comparisons_of([RecordFile(records)])
    assert comparison.runs == [0] and Path(records).read_bytes() == cut


def test_several_measurements_on_one_page(measured, capsys):
    few = {"contemplations": ["0"], "dtypes": ["bfloat16"], "baselines": ["plain"]}
    names = [measured("sampled", **few, temperatures=[0.5, 1.0], costs=True), measured("exact")]
    assert cli.main(["report", *names, "--output", "docs/results.md"]) == 0
    assert capsys.readouterr().out.endswith("docs/results.md\n")
    page = Path("docs/results.md").read_text()
    found = tables_on(page)
    rows = found["Accepted length and speed of every arm"]
    assert {(row["records"], row["T"]) for row in rows} == {("sampled", "0.5"), ("sampled", "1"), ("exact", "0")}
    texts = [row for row in found["Where texts part from plain generate's"] if row["records"] == "exact"]
    assert [(row["answers"], row["identical"], row["above 0.0001"]) for row in texts] == [("4", "4", "0")] * 4
    for name in names:
        count = len(list(RecordFile(name).answers))
        assert f"Records: {name}, {count} answers, SHA-256 {sha256(Path(name).read_bytes()).hexdigest()}." in page
        assert f"`confu evaluate {Path(name).stem}.yaml`" in page
    pictures = re.findall(r"!\[.*\]\((.*)\)", page)
    assert {Path("docs", picture) for picture in pictures} == set(Path("docs/results").iterdir())


def test_a_report_hands_its_figures_to_the_draft(measured, tiny_folders, monkeypatch):
    monkeypatch.setattr(report, "draw", lambda *data, **options: None)  # pictures take their time
    drafts = [f"mine={tiny_folders['draft']}", f"theirs={tiny_folders['draft']}"]
    measured("run", drafts=drafts, baselines=["plain"], contemplations=["0", "3"])
    CardFacts(license="mit").save(Path("mine").mkdir() or Path("mine", CARD_FILE))
    for _ in range(2):  # the same records once more change nothing
        assert cli.main(["report", "run.jsonl", "--output", "out", "--card", "mine"]) == 0
    facts = CardFacts.load(Path("mine", CARD_FILE))
    (evaluation,) = facts.evaluations
    assert facts.license == "mit" and "4 questions, float64, T = 0, up to 12 tokens; on cpu (" in evaluation.setting
    rows = {row.pop("arm"): row for row in evaluation.rows}
    (comparison,) = comparisons_of([RecordFile("run.jsonl")])
    assert rows.keys() == comparison.arms.keys() - {comparison.plain}
    for name, row in rows.items():
        arm = comparison.arms[name]
        assert row["tau"] == round(comparison.tau()[name][0], 3)
        assert row["speed_up"] == round(comparison.speedup_total()[name][0], 3)
        assert row.get("others", False) == (arm.draft != "mine") and row["contemplation"] == arm.contemplation
    Path("stranger").mkdir()
    with pytest.raises(ValueError, match="measured the drafts mine, theirs, not stranger"):
        cli.main(["--traceback", "report", "run.jsonl", "--output", "out", "--card", "stranger"])


def test_earlier_records_are_set_against_these_question_by_question(answered, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "draw", lambda *data, **options: None)
    settings, *units = map(json.loads, answered.read_text().splitlines())

    def rows_against(units, settings=settings):
        lines = (json.dumps(row) + "\n" for row in [settings, *reversed(units)])  # in another order
        Path("earlier.jsonl").write_text("".join(lines))
        assert cli.main(["report", answered.name, "--output", "out", "--against", "earlier.jsonl"]) == 0
        return tables_on(Path("out/report.md").read_text())["Against earlier records"]

    def sums(units):
        emitted = {}
        for unit in units:
            for answer in unit["answers"]:
                if answer["arm"]["kind"] == "draft":
                    counts = [count for turn in answer["turns"] for count in turn["rounds"]["emitted"]]
                    emitted.setdefault(answer["arm"]["contemplation"], []).extend(counts)
        return [sum(counts) / len(counts) for counts in emitted.values()]

    rows = rows_against(units)  # of one question each resample is the same on both sides
    assert len(rows) == 3 and all(row["difference"] == "0.00" and row["earlier"] == "earlier" for row in rows)

    now = sums(units)
    for number, unit in enumerate(units):
        for answer in unit["answers"]:
            if answer["arm"]["kind"] == "draft":
                answer["arm"]["draft"] = "another"
                answer["turns"][0]["rounds"]["emitted"] += [1] * number  # rounds that were lost
                answer["turns"][0]["rounds"]["accepted"] += [0] * number
    for row, tau, before in zip(rows_against(units), now, sums(units), strict=True):
        assert row["its tau"] == f"{before:.2f}" and row["tau"].startswith(f"{tau:.2f}")
        assert row["difference"].startswith(f"{tau - before:.2f} (")

    settings["questions"]["sha256"] = "0" * 64
    with pytest.raises(AssertionError):
        rows_against(units)
    assert "The earlier records earlier have no draft with the knobs, setting and questions" in capsys.readouterr().err


def test_text_above_the_mark_is_kept_and_other_files_are_not_touched(answered, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    output, command = Path("results.md"), ["report", "records.jsonl", "--output", "results.md"]
    assert cli.main(command) == 0
    mended = output.read_text().replace("# ConFu evaluation\n", "# Results\n\nThey are good.\n")
    output.write_text(mended)
    records, zipped = answered.read_bytes(), gzip.compress(answered.read_bytes())
    Path("records.jsonl.gz").write_bytes(zipped)
    assert cli.main(["report", "records.jsonl.gz", "--output", "results.md"]) == 0
    assert output.read_text() == mended  # compressed records give the same page

    output.write_text("Something else.\n")
    settings = records.splitlines(keepends=True)[0]
    Path("old.jsonl").write_bytes(settings + b'{"kind": "answer"}\n')
    Path("torn.jsonl.gz").write_bytes(zipped[:-50])
    Path("run.yaml").write_text("runs: 1\n")
    for arguments, sentence in (
        (["records.jsonl", "--output", "results.md"], "results.md has no line"),
        (["nothing.jsonl", "--output", "new.md"], "nothing.jsonl holds no answers; run its `confu evaluate`"),
        (["records.jsonl", "--output", "new.html"], "The output is new.html; expected a folder or a .md file."),
        (["run.yaml", "--output", "new.md"], "run.yaml, line 1"),
        (["old.jsonl", "--output", "new.md"], "old.jsonl, line 2 is no record of a measurement"),
        (["torn.jsonl.gz", "--output", "new.md"], "torn.jsonl.gz cannot be decompressed"),
    ):
        assert cli.main(["report", *arguments]) == 1
        assert sentence in capsys.readouterr().err
    assert output.read_text() == "Something else.\n" and not list(Path().glob("new*"))


def test_cells_are_the_same_on_every_page():
    cells = [{"arm": "<b> | x", "n": 1234, "share": 0.5, "none": None, "nan": float("nan")}, {"arm": "y", "T": "0"}]
    table = Table("Title", "", cells)
    assert report.markdown(table).splitlines()[2:5] == [
        "| arm | n | share | T |",
        "| --- | ---: | ---: | ---: |",
        r"| <b> \| x | 1,234 | 0.50 |  |",
    ]
    assert "&lt;b&gt; | x" in report.html_page([table])
    assert "T" not in Table("Title", "", [{"T": "0"}, {"T": "0"}]).cells()  # what all rows have in common


def sums_of(path):
    """(T, kind, N, depth, C, copies) -> group or "all" -> tokens, seconds, emitted, rounds, equal texts, all texts."""
    sums = {}
    for line in gzip.open(path, "rt", encoding="utf-8"):
        row = json.loads(line)
        for answer in row.get("answers", []):
            arm, turns = answer["arm"], answer["turns"]
            key = (f"{row['setting']['temperature']:g}", arm["kind"], arm["tree_size"], arm["depth"])
            key += (arm["contemplation"], arm.get("lookup", False))
            emitted = [count for turn in turns for count in (turn["rounds"] or {"emitted": []})["emitted"]]
            counts = np.array([sum(len(turn["token_ids"]) for turn in turns), sum(turn["seconds"] for turn in turns)])
            counts = np.append(counts, [sum(emitted), len(emitted), answer["departure"] is None, 1])
            for group in ("all", row["group"]):
                of_arm = sums.setdefault(key, {})
                of_arm[group] = of_arm.get(group, 0) + counts
    return sums


@pytest.fixture(scope="module")
def published():
    """Sums over the published records, by name, and the tables on the page made of them."""
    folders = [sorted((DOCS / "results" / folder).glob("*.jsonl.gz")) for folder in ("records", "earlier")]
    now, earlier = ({path.name.removesuffix(".jsonl.gz"): sums_of(path) for path in paths} for paths in folders)
    return now, earlier, tables_on((DOCS / "results.md").read_text(encoding="utf-8"))


def test_the_published_table_is_what_its_records_give(published):
    """Recomputed from the tokens and seconds of the records, without the code that made the page."""
    now, _, tables = published
    rows = tables["Accepted length and speed of every arm"]
    assert {row["records"] for row in rows} == now.keys()
    for name, sums in now.items():
        shown = [row for row in rows if row["records"] == name]
        for row, (key, counts) in zip(shown, sums.items(), strict=True):
            tokens, seconds, emitted, rounds, same, texts = counts["all"]
            plain = sums[key[0], "plain", None, None, None, False]["all"]
            assert row["T"] == key[0] and row["equal"] == f"{same:.0f}/{texts:.0f}"
            assert row["tau"].startswith(f"{emitted / rounds if rounds else 1:.2f}")
            assert row["speed-up"].startswith(f"{tokens / seconds * plain[1] / plain[0]:.2f}")


def test_the_published_differences_are_what_the_records_give(published):
    now, earlier, tables = published
    rows = tables["Against earlier records"]
    assert {row["earlier"] for row in rows} == earlier.keys()
    for row in rows:
        named = r"(?:ConFu, C = (\d+|N)|EAGLE-3 mode), N = (\d+), depth (\d)(, with lookup)?"
        contemplation, size, depth, copies = re.fullmatch(named, row["arm"]).groups("")
        contemplation = int(size if contemplation == "N" else contemplation or 0)
        key = (row["T"], "draft", int(size), int(depth), contemplation, bool(copies))
        here, there = now[row["records"]][key], earlier[row["earlier"]][key]
        taus = {group: (here[group][2] / here[group][3], there[group][2] / there[group][3]) for group in here}
        assert row["tau"].startswith(f"{taus['all'][0]:.2f}") and row["its tau"] == f"{taus['all'][1]:.2f}"
        for group, (tau, before) in taus.items():
            shown = float(row["difference" if group == "all" else group].split(" (")[0])
            assert abs(shown - (tau - before)) < 0.00501
