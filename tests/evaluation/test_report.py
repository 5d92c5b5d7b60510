"""Costs, plots and pages of a tiny measurement, through the command as users run it."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml

from helpers import make_tiny_draft, make_tiny_target
from transformers_confu.evaluation import command, costs
from transformers_confu.evaluation.arms import Arm
from transformers_confu.evaluation.costs import arm_cost, forward_curve


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
    monkeypatch.setattr(costs.medians, "__defaults__", (2,))


def test_the_command_reads_yaml_and_writes_a_page_of_one_file(options, tmp_path, few_repeats, capsys):
    folder = tmp_path / "out"
    options |= {"costs": True, "report": str(folder), "tree_sizes": [8, 4], "max_turns": 1}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(options))
    argv = [str(config), "--runs", "1"]  # options behind a file override it
    command.main(argv)
    printed = capsys.readouterr().out
    for expected in ("Runs: 1.", "| ConFu, C = 3, N = 8 |", f"Report: {folder / 'report.html'}"):
        assert expected in printed

    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    plots = ["survival", "speedup_by_group", "round_costs", "sizes", "budgets", "forward_curve"]
    assert len(page.sources) == len(plots)
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "@import" not in text and "url(" not in text and "<script" not in text
    assert f"confu evaluate {config} --runs 1" in page.text and "tree_sizes:" in page.text
    assert torch.__version__ in page.text
    assert page.tables == len(list((folder / "tables").glob("*.csv"))) == len(list((folder / "tables").glob("*.md")))

    markdown = (folder / "report.md").read_text(encoding="utf-8")
    for plot in plots:
        (path,) = [line for line in markdown.splitlines() if line.startswith("![") and line.endswith(f"{plot}.png)")]
        picture = folder / path.split("(")[1][:-1]
        assert picture.read_bytes().startswith(b"\x89PNG")
    with open(options["output"], encoding="utf-8") as file:
        labels = [row["label"] for row in map(json.loads, file) if row["kind"] == "cost"]
    assert labels == [
        "target forward",
        "ConFu, C = 3, N = 8",
        "ConFu, C = N, N = 8",
        "ConFu, C = 3, N = 4",
        "ConFu, C = N, N = 4",
    ]
    # All is measured: the same command only reports, from the same records.
    before = Path(options["output"]).read_bytes()
    command.main(argv)
    assert Path(options["output"]).read_bytes() == before


def test_the_command_line_takes_lists(options):
    argv = []
    for name, value in (options | {"runs": 1, "temperatures": [0.0, 0.5]}).items():
        argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    command.main(argv)
    with open(options["output"], encoding="utf-8") as file:
        temperatures = {row["setting"]["temperature"] for row in map(json.loads, file) if row["kind"] == "answer"}
    assert temperatures == {0.0, 0.5}


def test_costs_leave_everything_as_it_was_and_count_parameters(few_repeats):
    target = make_tiny_target()
    draft = make_tiny_draft(target)
    hooks = [dict(module._forward_hooks) for module in draft.modules()]
    cost = arm_cost(target, draft, Arm("draft", "d", 8, 4, 2, 3), list(range(2, 22)))
    assert [dict(module._forward_hooks) for module in draft.modules()] == hooks
    assert set(cost["per_round"]) == {"rows", "slots", "contemplate_experts", "future_experts", "projections"}
    assert all(cost["per_round"][name] > 0 for name in ("contemplate_experts", "future_experts", "projections"))
    total = sum(parameter.numel() for parameter in draft.parameters())
    assert sum(cost["parameters"].values()) == total
    config = draft.config
    assert cost["parameters"]["soft prompts"] == 5 * 2 * 2 * config.num_soft_prompts * 8
    experts = config.num_contemplate_experts
    # Experts, the router over the taps, its norm.
    assert cost["parameters"]["[con] experts and router"] == experts * 32 + experts * 96 + 96
    assert cost["slot_bytes"] == cost["parameters"]["soft prompts"] * 8
    assert [rows for rows, _ in forward_curve(target, draft, list(range(2, 22)))] == [1, 4]
