"""Guards of the house: what the inference files may import, so that a checkpoint carries all that it needs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports

import transformers_confu
from helpers import make_tiny_target


PACKAGE = Path(transformers_confu.__file__).parent
INFERENCE = {
    "configuration_confu",
    "modeling_confu",
    "draft_tree",
    "target_runner",
    "candidate_generator_confu",
    "generation_confu",
}
# huggingface_hub is no dependency beyond transformers: it supplies the `strict` decorator of every config class.
ALLOWED_PACKAGES = {"torch", "transformers", "huggingface_hub"} | sys.stdlib_module_names

inference_files = pytest.mark.parametrize("name", sorted(INFERENCE))


def parse(name: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))


def relative_imports(name: str) -> list[ast.ImportFrom]:
    """All of them, also those in functions and under conditions."""
    return [node for node in ast.walk(parse(name)) if isinstance(node, ast.ImportFrom) and node.level > 0]


def imported_while_running(name: str) -> set[str]:
    """The modules of [`relative_imports`] less those under `if TYPE_CHECKING:`, which only type checkers follow."""
    for_types = [
        node
        for block in ast.walk(parse(name))
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    ]
    lines = {node.lineno for node in for_types if isinstance(node, ast.ImportFrom)}
    return {node.module for node in relative_imports(name) if node.lineno not in lines}


@pytest.mark.parametrize("name", [*sorted(INFERENCE), "custom_generate/generate"])
def test_inference_imports_only_torch_transformers_and_the_standard_library(name):
    imported = set()
    for node in ast.walk(parse(name)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            imported.add(node.module.split(".")[0])
    assert imported <= ALLOWED_PACKAGES


@inference_files
def test_inference_imports_only_inference_and_by_name_from_its_own_folder(name):
    for node in relative_imports(name):
        assert node.level == 1 and node.module in INFERENCE, f"{name}.py, line {node.lineno}: {ast.unparse(node)}"


@inference_files
def test_the_remote_code_copier_sees_exactly_the_real_imports(name):
    # The copier searches text: it misses some forms of import, and takes an example in a docstring for an import.
    assert set(get_relative_imports(PACKAGE / f"{name}.py")) == {node.module for node in relative_imports(name)}


def test_a_saved_checkpoint_carries_the_whole_engine():
    copied = get_relative_import_files(PACKAGE / "modeling_confu.py")
    assert {Path(file).stem for file in copied} | {"modeling_confu"} == INFERENCE


def test_inference_files_import_each_other_in_one_direction():
    imports = {name: imported_while_running(name) for name in INFERENCE}
    while leaves := {name for name, needed in imports.items() if not needed & imports.keys()}:
        imports = {name: needed for name, needed in imports.items() if name not in leaves}
    assert not imports, f"These files import each other in a circle: {sorted(imports)}."


def test_importing_the_package_loads_only_inference():
    program = (
        "import sys, transformers_confu.modeling_confu\n"
        "print(*{m.split('.')[1] for m in sys.modules if m.startswith('transformers_confu.')}, 'gguf' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert set(result.stdout.split()) <= INFERENCE | {"False"}


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_tiny_targets_write_varied_texts(kind):
    # On a text that falls into a loop, an engine that mixes up positions or branches can still look right.
    before = torch.random.get_rng_state()
    target = make_tiny_target(kind)
    assert torch.equal(before, torch.random.get_rng_state())
    text = target.generate(torch.tensor([[1, 5, 9]]), do_sample=False, max_new_tokens=60)[0, 3:]
    assert len(text) == 60
    assert len(text.unique()) >= 10
    assert not any(torch.equal(text[-20:], text[-20 - period : -period]) for period in range(1, 30))
