"""What the package needs where only its own dependencies are installed, and what it says where more is asked for."""

import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

from transformers_confu.common.extras import EXTRAS, require


# jinja2 comes with torch, but decoding needs no template.
BLOCKED = [*(package for packages in EXTRAS.values() for package in packages), "jinja2"]
BLOCK = f"import sys\nfor name in {BLOCKED!r}:\n    sys.modules[name] = None\n"


def run(program: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", BLOCK + textwrap.dedent(program)], capture_output=True, text=True)


def test_decoding_needs_no_extra():
    result = run(f"""
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        import torch
        import transformers_confu
        from helpers import make_tiny_draft, make_tiny_target

        for name in transformers_confu.__all__:
            getattr(transformers_confu, name)
        target = make_tiny_target()
        ids, options = torch.tensor([[1, 5, 9]]), {{"max_new_tokens": 16, "do_sample": False}}
        text = target.generate(ids, assistant_model=make_tiny_draft(target), **options)
        print(torch.equal(text, target.generate(ids, **options)))
    """)
    assert result.stdout == "True\n", result.stderr


def test_commands_and_parts_that_need_an_extra_name_it_and_others_need_none():
    commands = ["demo", "chat", "check", "publish", "convert in", "convert out", "convert resize", "convert mean"]
    result = run(f"""
        from importlib import import_module
        from transformers_confu.cli import main

        for command in {commands!r}:
            try:
                main([*command.split(), "--help"])
            except SystemExit:
                pass
        for room, part in (("training", "ConFuTrainer"), ("data", "prepare_dataset"), ("data", "regenerate_served")):
            try:
                getattr(import_module(f"transformers_confu.{{room}}"), part)
            except ModuleNotFoundError as error:
                print(error)
    """)
    assert all(f"usage: confu {command} " in result.stdout for command in commands), result.stderr
    advice = "is not installed: pip install 'transformers-confu[train]'.\n"
    assert result.stdout.count(advice) == 3, result.stderr


def test_a_module_that_no_extra_brings_is_no_matter_of_extras():
    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_package'"):
        require("no_such_package")


def test_importing_the_package_loads_nothing_heavy():
    """`import transformers_confu` costs no more than `import transformers`, which it does not even need."""
    result = run("before = set(sys.modules); import transformers_confu; print(*(set(sys.modules) - before))")
    loaded = {name.split(".")[0] for name in result.stdout.split()} - sys.stdlib_module_names
    assert loaded <= {"transformers_confu"}, loaded


def test_the_extras_of_the_project_are_those_of_the_sentences():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    needed = {line.split(">=")[0] for line in project["dependencies"]}
    assert needed == {"torch", "transformers", "accelerate", "huggingface-hub", "safetensors"}
    extras = {
        name: {line.split(">=")[0] for line in lines} for name, lines in project["optional-dependencies"].items()
    }
    for extra, packages in EXTRAS.items():
        assert extras[extra] == set(packages) - {"pyarrow"}  # which comes with datasets
