"""The wheel that users install: everything a command reads is in it, and nothing leans on the repository."""

import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import venv
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_an_installed_wheel_has_all_that_its_commands_read(tmp_path):
    source = tmp_path / "source"  # a build leaves files behind
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    shipped = {str(file.relative_to(source / "src")) for file in (source / "src").rglob("*")}
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    paths = {"base": str(tmp_path / "venv"), "platbase": str(tmp_path / "venv")}
    packages = Path(sysconfig.get_path("purelib", vars=paths))
    subprocess.run([*pip, "install", "--no-deps", "--target", str(packages), str(wheel)], check=True)
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # those of this environment

    program = """
        import transformers_confu
        from transformers_confu.cli import main

        print(transformers_confu.__file__)
        for command in ("", "demo", "publish", "data prompts", "train", "evaluate"):
            try:
                main([*command.split(), "--help"])
            except SystemExit as end:
                assert end.code == 0, command
    """
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    command = [str(python), "-c", textwrap.dedent(program)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(packages)) and result.stdout.count("usage: confu ") == 6
    installed = {str(file.relative_to(packages)) for file in packages.rglob("*")}
    assert shipped <= installed, shipped - installed
