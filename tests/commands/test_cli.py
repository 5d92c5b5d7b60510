"""The command line: its table leads to real modules, and its help comes at once and teaches."""

import importlib.metadata
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

from transformers_confu import cli


@pytest.fixture
def fake_command(monkeypatch):
    """Let every command be a function; the lists of arguments that it got."""
    calls = []

    def install(command):
        def main(argv):
            calls.append((argv, sys.argv))
            return command()

        monkeypatch.setattr(cli, "import_module", lambda name: SimpleNamespace(main=main))
        monkeypatch.setattr(sys, "argv", ["confu"])
        return calls

    return install


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_with_an_example_and_options_in_both_spellings(name, capsys):
    command = cli.COMMANDS[name]
    assert len(command.summary.splitlines()) == 1 and command.summary.endswith(".")
    assert command.example.startswith(f"confu {name}")
    with pytest.raises(SystemExit) as end:
        cli.main([*name.split(), "--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: confu {name}")
    options = [word for word in shlex.split(command.example) if word.startswith("--")]
    assert all(option in printed for option in options)
    for option in re.findall(r"(?<=\s)--((?:no[-_])?[a-z0-9_-]+)", printed):
        assert f"--{option.replace('_', '-')}" in printed and f"--{option.replace('-', '_')}" in printed


def test_help_needs_neither_torch_nor_transformers():
    program = (
        "import sys; from transformers_confu.cli import main; main(['--help']);"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for name, command in cli.COMMANDS.items():
        assert f"\n  {name}\n" in result.stdout and f"$ {command.example}\n" in result.stdout


def test_without_a_command_all_are_listed_and_a_group_lists_its_own(capsys):
    for argv in ([], ["-h"], ["--help"], ["help"]):
        assert cli.main(argv) == 0
        printed = capsys.readouterr().out
        assert all(f"\n  {name}\n" in printed for name in cli.COMMANDS)
    assert cli.main(["data"]) == cli.main(["data", "--help"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n  data regenerate\n") == 2 and "\n  train\n" not in printed


@pytest.mark.parametrize(
    ("argv", "given", "nearest"),
    [
        (["trian", "--help"], "trian", "train"),
        (["data", "regenrate"], "data regenrate", "data regenerate"),
        (["dta", "regenerate"], "dta", "data"),
        (["--target", "demo"], "--target", None),
    ],
)
def test_an_unknown_command_names_the_nearest(argv, given, nearest, capsys):
    assert cli.main(argv) == 2
    printed = capsys.readouterr().err
    assert f"there is no command `{given}`" in printed
    assert nearest is None or f"did you mean `confu {nearest}`?" in printed
    assert len(printed.splitlines()) == 1


def test_arguments_and_exit_status_go_through(fake_command, capsys):
    calls = fake_command(lambda: 3)
    assert cli.main(["data", "regenerate", "--output", "a b"]) == 3
    assert calls == [(["--output", "a b"], ["confu data regenerate", "--output", "a b"])]
    fake_command(lambda: None)
    assert cli.main(["train", "config.yaml"]) == 0
    fake_command(mock.Mock(side_effect=KeyboardInterrupt))
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def in_package(body: str) -> Callable[[], None]:
    """A function whose code counts as a file of the package."""
    names: dict = {}
    file = str(Path(cli.__file__).parent / "made_up.py")
    exec(compile(f"import json, torch\nfrom pathlib import Path\ndef run():\n    {body}", file, "exec"), names)
    return names["run"]


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("raise ValueError('`runs` is 0; expected at least 1.')", "`runs` is 0; expected at least 1."),
        ("raise FileExistsError('out is not empty.')", "out is not empty."),
        ("Path('no/such/file.yaml').read_text()", "no/such/file.yaml: No such file or directory"),
    ],
)
def test_what_the_package_refuses_is_one_sentence(body, sentence, fake_command, capsys):
    fake_command(in_package(body))
    assert cli.main(["train"]) == 1
    assert capsys.readouterr().err == f"{sentence}\n"


@pytest.mark.parametrize("argv", [["--traceback", "train"], ["train", "--traceback"]])
def test_a_traceback_can_be_asked_for(argv, fake_command):
    calls = fake_command(in_package("raise ValueError('A sentence.')"))
    with pytest.raises(ValueError, match="A sentence."):
        cli.main(argv)
    assert "--traceback" not in calls[0][0]


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("first, second = [1]", ValueError),  # not enough values to unpack
        ("json.loads('')", ValueError),  # without the name of the file
        ("torch.zeros(2) @ torch.zeros(3)", RuntimeError),
        ("torch.utils.data.DataLoader([1], num_workers=-1)", ValueError),  # a `raise` of torch
        ("None.name", AttributeError),
        ("import no_such_package", ModuleNotFoundError),
    ],
)
def test_a_fault_of_the_program_or_a_library_keeps_its_traceback(body, kind, fake_command, capsys):
    fake_command(in_package(body))
    with pytest.raises(kind):
        cli.main(["train"])
    assert capsys.readouterr().err == ""


def test_a_missing_package_names_the_extra_that_brings_it():
    program = (
        "import sys; sys.modules['pandas'] = None\n"
        "from transformers_confu.cli import main; sys.exit(main(['evaluate', '--help']))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    assert "the package pandas, which is not installed: pip install 'transformers-confu[eval]'." in result.stderr


def test_the_module_speaks_as_the_command(tmp_path, monkeypatch, capsys):
    """For launchers of several processes, which start a module."""
    monkeypatch.setattr(sys, "argv", ["cli.py", "train", str(tmp_path / "run.yaml")])
    with pytest.warns(RuntimeWarning, match="found in sys.modules"), pytest.raises(SystemExit, match="1"):
        runpy.run_module("transformers_confu.cli", run_name="__main__")
    assert capsys.readouterr().err == f"{tmp_path / 'run.yaml'}: No such file or directory\n"


def test_the_version_is_the_packages(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"transformers-confu {importlib.metadata.version('transformers-confu')}\n"
