"""Pages of a tiny measurement, made by the commands as users run them, and the published page."""

import gzip
import json
import re
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from helpers import make_tiny_draft, make_tiny_target
from transformers_confu import cli
from transformers_confu.evaluation import costs, report
from transformers_confu.evaluation.arms import Arm
from transformers_confu.evaluation.records import RecordFile
from transformers_confu.evaluation.report import MARK
from transformers_confu.evaluation.tables import Table


DOCS = Path(__file__).parents[2] / "docs"


class Page(HTMLParser):
    """Collects what a browser would fetch, and whether every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.sources, self.open, self.tables, self.text = [], [], 0, ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]
        self.tables += tag == "table"
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def few_repeats(monkeypatch):
    monkeypatch.setattr(costs, "CURVE_ROWS", (1, 4))
    monkeypatch.setattr(costs, "REPEATS", 2)


@pytest.fixture
def measured(options, tmp_path, monkeypatch, few_repeats):
    """Runs `confu evaluate` on a file of options, in an empty folder; the name of the records."""
    monkeypatch.chdir(tmp_path)

    def measure(name, *argv, **changes):
        settings = options | {"max_turns": 1, "output": f"{name}.jsonl"} | changes
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
    changes = {"costs": True, "report": "out", "tree_sizes": [8, 4], "depths": [4, 2], "one_factor": True}
    argv = ("--runs", "1")  # options behind a file override it
    records = measured("base", *argv, **changes)
    printed = capsys.readouterr().out
    for expected in (
        "| ConFu, C = 3, N = 8, depth 4 |",
        "**base (4 questions, float64",
        "Report: out/report.html",
    ):
        assert expected in printed

    text = Path("out/report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    plots = ["speedup_by_group", "tree_size", "depth", "contemplation", "survival", "round_costs", "forward_curve"]
    assert len(page.sources) == len(plots)
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "@import" not in text and "url(" not in text and "<script" not in text
    assert "confu evaluate base.yaml --runs 1" in page.text and "tree_sizes:" in page.text
    assert torch.__version__ in page.text and "tau_greedy" in page.text
    assert len(re.findall("<h2>", text)) == 5
    assert page.tables == len(list(Path("out").glob("*.csv"))) == 10

    markdown = Path("out/report.md").read_text(encoding="utf-8")
    assert re.findall(r"!\[.*\]\(./(.*).png\)", markdown) == plots
    assert all(Path("out", f"{plot}.png").read_bytes().startswith(b"\x89PNG") for plot in plots)
    # The page begins with its conclusion, and names depth and branching.
    assert markdown.split(MARK)[1].strip().startswith("**base (4 questions, float64, T = 0, up to 12 tokens)**: ")
    rows = tables_on(markdown)["Accepted length and speed of every arm"]
    trees = {(row["N"], row["depth"], row["branching"]) for row in rows if row["arm"].startswith("ConFu")}
    assert trees == {("8", "4", "2"), ("8", "2", "2"), ("4", "4", "2")}
    kinds = [
        cost["arm"] and (cost["arm"]["tree_size"], cost["arm"]["contemplation"]) for cost in RecordFile(records).costs
    ]
    assert kinds == [None, (8, 3), (8, 8), (8, 3), (8, 8), (4, 3), (4, 4)]
    # All is measured: the same command only reports, from the same records.
    before = Path(records).read_bytes()
    measured("base", *argv, **changes)
    assert Path(records).read_bytes() == before


def test_several_measurements_on_one_page(measured, capsys):
    names = [
        measured("base", dtypes=["bfloat16"]),
        measured("sampled", dtypes=["bfloat16"], temperatures=[0.5, 1.0], contemplations=["0"], runs=1),
        measured("exact", runs=1),
    ]
    assert cli.main(["report", *names, "--output", "docs/results.md"]) == 0
    assert capsys.readouterr().out.endswith("docs/results.md\n")
    page = Path("docs/results.md").read_text()
    found = tables_on(page)
    rows = found["Accepted length and speed of every arm"]
    # Full precision is measured for its texts.
    assert {(row["records"], row["T"]) for row in rows} == {("base", "0"), ("sampled", "0.5"), ("sampled", "1")}
    texts = [row for row in found["Where texts part from plain generate's"] if row["records"] == "exact"]
    assert [(row["answers"], row["identical"], row["above 0.0001"]) for row in texts] == [("4", "4", "0")] * 4

    def turns(label, run=None):
        return [
            turn
            for unit, answer in RecordFile("base.jsonl").answers
            if run in (None, unit["run"]) and answer["arm"]["kind"] + str(answer["arm"]["contemplation"]) == label
            for turn in answer["turns"]
        ]

    row = next(row for row in rows if row["arm"] == "ConFu, C = 3, N = 8")
    taus, speedups = {}, []
    for label in ("draft3", "draft0"):
        emitted = [count for turn in turns(label) for count in turn["rounds"]["emitted"]]
        taus[label] = sum(emitted) / len(emitted)
    assert row["tau"].startswith(f"{taus['draft3']:.2f}")
    assert float(row["against EAGLE-3 mode"].split(" (")[0]) == pytest.approx(
        taus["draft3"] - taus["draft0"], abs=0.0051
    )
    for run in (0, 1):
        rates = [
            sum(len(turn["token_ids"]) for turn in turns(label, run))
            / sum(turn["seconds"] for turn in turns(label, run))
            for label in ("draft3", "plainNone")
        ]
        speedups.append(rates[0] / rates[1])
    assert row["by run"] == f"{min(speedups):.2f} to {max(speedups):.2f}"
    for name in names:
        count = len(list(RecordFile(name).answers))
        assert f"Records: {name}, {count} answers, SHA-256 {sha256(Path(name).read_bytes()).hexdigest()}." in page
        assert f"```\nconfu evaluate {Path(name).stem}.yaml\n\n# {Path(name).stem}.yaml\n" in page
    assert {Path("docs", picture) for picture in re.findall(r"!\[.*\]\((.*)\)", page)} == set(
        Path("docs/results").iterdir()
    )


def test_text_above_the_mark_is_kept_and_other_files_are_not_touched(measured, capsys):
    records = measured("base", runs=1)
    output, command = Path("results.md"), ["report", records, "--output", "results.md"]
    assert cli.main(command) == 0
    first = output.read_text()
    mended = first.replace("# ConFu evaluation\n", "# Results\n\nThey are good.\n")
    output.write_text(mended)
    assert cli.main(command) == 0
    assert output.read_text() == mended
    Path("base.jsonl.gz").write_bytes(gzip.compress(Path(records).read_bytes()))
    assert cli.main(["report", "base.jsonl.gz", "--output", "results.md"]) == 0
    assert output.read_text() == mended  # compressed records give the same page

    output.write_text("Something else.\n")
    Path("empty.jsonl").write_text(Path(records).read_text().splitlines()[0] + "\n")
    Path("old.jsonl").write_text(Path("empty.jsonl").read_text() + '{"kind": "answer"}\n')
    Path("torn.jsonl.gz").write_bytes(gzip.compress(Path(records).read_bytes())[:-50])
    capsys.readouterr()
    for arguments, sentence in (
        ([records, "--output", "results.md"], "results.md has no line"),
        (["nothing.jsonl", "--output", "new.md"], "There is no file nothing.jsonl; give the `output` of"),
        ([records, "--output", "new.html"], "The output is new.html; expected a folder or a .md file."),
        (["base.yaml", "--output", "new.md"], "base.yaml, line 1"),
        (["empty.jsonl", "--output", "new.md"], "empty.jsonl holds no answers yet; run its `confu evaluate` first."),
        (["old.jsonl", "--output", "new.md"], "old.jsonl, line 2 is no record of a measurement"),
        (["torn.jsonl.gz", "--output", "new.md"], "torn.jsonl.gz cannot be decompressed after line"),
    ):
        assert cli.main(["report", *arguments]) == 1
        assert sentence in capsys.readouterr().err
    assert output.read_text() == "Something else.\n" and not list(Path().glob("new*"))


def test_an_unfinished_measurement_is_read_as_it_is(measured):
    records = Path(measured("base"))
    cut = records.read_bytes()[:-40]  # while the last question of the second run was written
    records.write_bytes(cut)
    assert cli.main(["report", str(records), "--output", "out"]) == 0
    assert records.read_bytes() == cut
    rows = tables_on(Path("out/report.md").read_text())["Accepted length and speed of every arm"]
    assert rows[0]["equal"] == "4/4"  # of the first run


def test_cells_are_the_same_on_every_page():
    cells = [{"arm": "<b> | x", "n": 1234, "share": 0.5, "none": None, "nan": float("nan")}, {"arm": "y", "T": "0"}]
    table = Table("t", "T", "", cells)
    assert report.markdown(table).splitlines()[2:5] == [
        "| arm | n | share | none | nan |",
        "| --- | ---: | ---: | ---: | ---: |",
        r"| <b> \| x | 1,234 | 0.50 |  |  |",
    ]
    assert "&lt;b&gt; | x" in report.html_page([table]) and "T" not in table.frame()
    frame = pd.read_csv(pd.io.common.StringIO(table.csv()))
    assert frame["n"][0] == 1234 and frame["arm"][0] == "<b> | x"


def test_costs_leave_everything_as_it_was_and_count_parameters(few_repeats):
    target = make_tiny_target()
    draft = make_tiny_draft(target)
    hooks = [dict(module._forward_hooks) for module in draft.modules()]
    cost = costs.arm_cost(target, draft, Arm("draft", "d", 8, 4, 2, 3), list(range(2, 22)))
    assert [dict(module._forward_hooks) for module in draft.modules()] == hooks
    assert set(cost["per_round"]) == {"rows", "slots", "contemplate_experts", "future_experts", "projections"}
    assert all(cost["per_round"][name] > 0 for name in ("contemplate_experts", "future_experts", "projections"))
    assert sum(cost["parameters"].values()) == sum(parameter.numel() for parameter in draft.parameters())
    assert cost["parameters"]["soft prompts"] == 5 * 2 * 2 * draft.config.num_soft_prompts * 8
    experts = draft.config.num_contemplate_experts
    # Experts, the router over the taps, its norm.
    assert cost["parameters"]["[con] experts and router"] == experts * 32 + experts * 96 + 96
    assert cost["slot_bytes"] == cost["parameters"]["soft prompts"] * 8
    assert [rows for rows, _ in costs.forward_curve(target, draft, list(range(2, 22)))] == [1, 4]


def test_the_published_table_is_what_its_records_give():
    """Recomputed from the tokens and seconds of the records, without the code that made the page."""
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    found = {}
    for name in ("base", "tree_size", "temperature", "all_questions"):
        sums = {}
        for line in gzip.open(DOCS / "results" / "records" / f"{name}.jsonl.gz", "rt", encoding="utf-8"):
            row = json.loads(line)
            for answer in row.get("answers", []):
                arm = answer["arm"]
                key = f"{row['setting']['temperature']:g}", arm["kind"], arm["tree_size"], arm["contemplation"]
                counts = sums.setdefault(key, [0, 0, 0, 0, 0, 0])
                for turn in answer["turns"]:
                    emitted = (turn["rounds"] or {"emitted": []})["emitted"]
                    added = len(turn["token_ids"]), turn["seconds"], sum(emitted), len(emitted)
                    counts[:4] = [count + more for count, more in zip(counts, added, strict=False)]
                counts[4:] = counts[4] + (answer["departure"] is None), counts[5] + 1
        for key, (tokens, seconds, emitted, rounds, same, all_of) in sums.items():
            plain = sums[key[0], "plain", None, None]
            tau = emitted / rounds if rounds else 1
            found.setdefault(name, []).append(
                (key[0], tau, tokens / seconds * plain[1] / plain[0], f"{same}/{all_of}")
            )
    rows = tables_on(page)["Accepted length and speed of every arm"]
    for name, expected in found.items():
        shown = [row for row in rows if row["records"] == name]
        assert len(shown) == len(expected)
        for row, (temperature, tau, speedup, equal) in zip(shown, expected, strict=True):
            assert row["T"] == temperature and row["equal"] == equal
            assert row["tau"].startswith(f"{tau:.2f}") and row["speed-up"].startswith(f"{speedup:.2f}")
