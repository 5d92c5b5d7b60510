"""README and docs: every Python snippet runs, with tiny models for those it names; every command is one of ours."""

import json
import re
import shlex
import sys
import types
from argparse import ArgumentParser
from pathlib import Path

import pytest
import torch

from helpers import example_models
from transformers_confu import ConFuConfig, ConFuDraftModel
from transformers_confu.cli import COMMANDS, main
from transformers_confu.publishing.model_card import CardFacts


ROOT = Path(__file__).parents[1]
GUIDES = [ROOT / "README.md", *sorted(path for path in ROOT.glob("docs/*.md") if path.name != "results.md")]
DOCUMENTS = [
    *GUIDES,
    ROOT / "CONTRIBUTING.md",
    ROOT / "hub_cards/README.md",
    *sorted(ROOT.glob("examples/*/README.md")),
]

documents = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def blocks(path: Path, language: str) -> list[str]:
    """Code blocks of a document."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder where the names that snippets use are tiny models and a few rows of data."""
    folder = tmp_path_factory.mktemp("documents")
    target, tokenizer = example_models()
    torch.manual_seed(0)
    draft = ConFuDraftModel(ConFuConfig.from_target(target.config))
    for name in ("org/target", "HuggingFaceTB/SmolLM2-135M-Instruct"):
        target.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name in ("org/draft", "hub_cards/confu-smollm2-135m-instruct"):
        draft.save_pretrained(folder / name)
    (folder / "examples").symlink_to(ROOT / "examples")
    questions = [f"Question {number}?" for number in range(12)]
    for name, rows in {
        "prompts": [{"id": number, "prompt": question} for number, question in enumerate(questions)],
        "answers": [{"prompt": question, "answer_ids": [*range(40, 60)]} for question in questions],
    }.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


@pytest.fixture
def run_guide(workplace, monkeypatch):
    """Factory: run all Python blocks of a guide, one after the other; the names that they leave."""
    monkeypatch.chdir(workplace)

    def run(name: str) -> dict:
        path = ROOT / name
        names: dict = {}
        for number, block in enumerate(blocks(path, "python"), start=1):
            block = block.replace("8192", "200")  # the tiny target has fewer tokens
            exec(compile(block, f"{name}, block {number}", "exec"), names)
        return names

    return run


def test_readme_prints_the_targets_own_text(run_guide, capsys):
    names = run_guide("README.md")
    target, tokenizer, inputs = (names[name] for name in ("target", "tokenizer", "inputs"))
    assert tokenizer.decode(target.generate(**inputs, max_new_tokens=64)[0]) in capsys.readouterr().out
    assert names["draft"].last_statistics.tree_sizes[0] == 16


def test_serving(run_guide, monkeypatch):
    class HFLM:
        """As that of lm-evaluation-harness generates."""

        def __init__(self, pretrained, tokenizer, batch_size):
            self.model = pretrained

        def _model_generate(self, context, max_length, stop, **generation_kwargs):
            return self.model.generate(input_ids=context, max_length=max_length, **generation_kwargs)

    harness = types.ModuleType("lm_eval.models.huggingface")
    harness.HFLM = HFLM
    monkeypatch.setitem(sys.modules, harness.__name__, harness)
    names = run_guide("docs/serving.md")
    target, tokenizer, draft = (names[name] for name in ("target", "tokenizer", "draft"))
    inputs = tokenizer("What is a prime number?", return_tensors="pt")
    assert names["answers"][0] == tokenizer.decode(target.generate(**inputs, max_new_tokens=64)[0])
    draft.last_statistics = None
    expected = target.generate(inputs["input_ids"], max_length=40)
    assert torch.equal(names["lm"]._model_generate(inputs["input_ids"], 40, []), expected)
    assert draft.last_statistics.rounds > 0


def test_data(run_guide):
    names = run_guide("docs/data.md")
    held_out = set(names["eval_dataset"]["prompt_hash"])
    assert held_out and not held_out & set(names["train_dataset"]["prompt_hash"])


def test_training_leaves_a_draft_that_decodes(run_guide):
    names = run_guide("docs/training.md")
    target, ids = names["target"], torch.tensor([[5, 6, 7]])
    draft = ConFuDraftModel.from_pretrained("runs/own")
    assert torch.equal(
        target.generate(ids, max_new_tokens=20, assistant_model=draft), target.generate(ids, max_new_tokens=20)
    )


def test_evaluating(run_guide):
    assert run_guide("docs/evaluating.md")["result"]["tau"] == 2.0


def test_publishing(run_guide, tmp_path, monkeypatch):
    run_guide("docs/publishing.md")
    assert {"README.md", "custom_generate", "decoding.py"} <= {path.name for path in Path("published").iterdir()}
    monkeypatch.chdir(tmp_path)  # where the target is no folder
    Path("card.yaml").write_text(blocks(ROOT / "docs/publishing.md", "yaml")[0])
    assert CardFacts.load("card.yaml").base_model == "org/target"


def test_no_other_guide_has_python():
    tested = {
        "README.md",
        *(f"docs/{name}.md" for name in ("serving", "data", "training", "evaluating", "publishing")),
    }
    assert {str(path.relative_to(ROOT)) for path in GUIDES if blocks(path, "python")} == tested


class Reached(BaseException):
    """A command has come to its parser of options."""


@pytest.fixture
def reach(workplace, monkeypatch):
    """Factory: the parser of a command line of `confu`, and the options given to it, those of a YAML file too."""
    monkeypatch.chdir(workplace)
    parse = ArgumentParser.parse_known_args

    def stop(parser, args=None, namespace=None, **kwargs):
        if parser.add_help:
            raise Reached(parser, list(args))
        return parse(parser, args, namespace, **kwargs)  # a helper's

    def reach(words: list[str]) -> tuple[ArgumentParser, list[str]]:
        with monkeypatch.context() as patched:
            patched.setattr(ArgumentParser, "parse_known_args", stop)
            patched.setattr(sys, "argv", ["confu"])
            with pytest.raises(Reached) as reached:
                assert main(words) == 0, words
        return reached.value.args

    return reach


def command_lines(path: Path) -> list[list[str]]:
    """Words of the lines of all shell blocks."""
    text = "\n".join(blocks(path, "bash")).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


@documents
def test_commands_in_blocks_are_understood(path, reach, capsys):
    for block in blocks(path, "yaml"):
        if named := re.match(r"# (\S+\.yaml)\n", block):
            Path(named[1]).write_text(block)
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in command_lines(path):
        if "transformers_confu.cli" in words:
            words = ["confu", *words[words.index("transformers_confu.cli") + 1 :]]
        if words[0] == "confu":
            parser, options = reach(words[1:])
            _, unknown = parser.parse_known_args(options)  # exits where a value is wrong or one is missing
            assert not unknown, (words, unknown)
        elif words[0] == "make":
            assert words[1] in targets
        else:
            assert words[0] in {"pip", "torchrun", "accelerate"} or (ROOT / words[0]).is_file(), words


@documents
def test_commands_in_the_text_exist(path, reach):
    for span in re.findall(r"`(confu [^`]+)`", path.read_text(encoding="utf-8")):
        words = span.split()[1:]
        name = next((name for length in (2, 1) if (name := " ".join(words[:length])) in COMMANDS), None)
        if name is None:
            groups = {name.split()[0] for name in COMMANDS}
            assert span in {"confu --help", "confu COMMAND --help", *(f"confu {group}" for group in groups)}
            continue
        parser, _ = reach(name.split())
        known = {option for action in parser._actions for option in action.option_strings}
        assert {word for word in words if word.startswith("--")} <= known, span


def test_the_table_of_options_names_only_those_that_exist(reach):
    text = (ROOT / "docs/command_line.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `confu ([a-z -]+)` \| (.*)$", text, re.MULTILINE))
    assert set(rows) == set(COMMANDS)
    for name, options in rows.items():
        parser, _ = reach(name.split())
        known = {option for action in parser._actions for option in action.option_strings}
        assert set(re.findall(r"`(--\w+)`", options)) <= known, name


@documents
def test_links_lead_somewhere(path):
    for file, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", path.read_text(encoding="utf-8")):
        if "://" in file:
            continue
        linked = path.parent / file if file else path
        assert linked.exists(), file
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            # As GitHub makes them.
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, (file, anchor)
