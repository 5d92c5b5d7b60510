"""Guards of the house: who may import whom, and that a checkpoint carries all that it needs."""

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
# From the ground up: a part imports only from floors below its own.
FLOORS = [
    {"inference"},
    {"common", "auto_classes"},
    {"data", "conversion", "publishing"},
    {"training", "evaluation"},
    {"commands"},
    {"cli"},
]
INFERENCE = {path.stem for path in (PACKAGE / "inference").glob("*.py")} - {"__init__"}
# huggingface_hub is no dependency beyond transformers: it supplies the `strict` decorator of every config class.
ALLOWED_PACKAGES = {"torch", "transformers", "huggingface_hub"} | sys.stdlib_module_names


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_modules(path: Path) -> set[str]:
    """
    Modules of this package that a file imports, as dotted names below the package: also those in functions, and those
    that only type checkers follow.
    """
    here = path.relative_to(PACKAGE).with_suffix("").parts
    found = set()
    for node in ast.walk(parse(path)):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        base = (*here[: len(here) - node.level], *(node.module or "").split("."))
        base = tuple(part for part in base if part)
        for alias in node.names:  # `from . import module` names modules where others name what is in them
            module = (*base, alias.name)
            is_module = (PACKAGE.joinpath(*module).with_suffix(".py")).is_file() or PACKAGE.joinpath(*module).is_dir()
            found.add(".".join(module if is_module else base))
    return found - {""}


def all_imports() -> dict[str, set[str]]:
    """Every module below the package, and what it imports of the package."""
    files = {path: ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}
    return {name: imported_modules(path) for path, name in files.items() if name != "__init__"}


def test_parts_stand_on_floors_below_their_own():
    floor_of = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}
    assert floor_of.keys() == {name.split(".")[0] for name in all_imports()}
    climbs = [
        f"{name} imports {imported}"
        for name, imports in all_imports().items()
        for imported in imports
        if (part := name.split(".")[0]) != (other := imported.split(".")[0]) and floor_of[other] >= floor_of[part]
    ]
    assert not climbs, climbs


def test_no_files_import_each_other_in_a_circle():
    imports = all_imports()
    packages = {name.removesuffix(".__init__") for name in imports if name.endswith(".__init__")}
    imports = {
        name: {f"{other}.__init__" if other in packages else other for other in others} - {name}
        for name, others in imports.items()
    }
    while leaves := {name for name, needed in imports.items() if not needed & imports.keys()}:
        imports = {name: needed for name, needed in imports.items() if name not in leaves}
    assert not imports, f"These files import each other in a circle: {sorted(imports)}."


@pytest.mark.parametrize("name", [*sorted(INFERENCE), "custom_generate/generate"])
def test_inference_imports_only_torch_transformers_and_by_name_from_its_own_folder(name):
    for node in ast.walk(parse(PACKAGE / "inference" / f"{name}.py")):
        where = f"{name}.py, line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= ALLOWED_PACKAGES, where
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module.split(".")[0] in ALLOWED_PACKAGES, where
        elif isinstance(node, ast.ImportFrom) and name in INFERENCE:
            assert node.level == 1 and node.module in INFERENCE, where


@pytest.mark.parametrize("name", sorted(INFERENCE))
def test_the_remote_code_copier_sees_exactly_the_real_imports(name):
    # The copier searches text: it misses some forms of import, and takes an example in a docstring for an import.
    path = PACKAGE / "inference" / f"{name}.py"
    real = {module.removeprefix("inference.") for module in imported_modules(path)}
    assert set(get_relative_imports(path)) == real


def test_a_saved_checkpoint_carries_the_whole_engine():
    copied = get_relative_import_files(PACKAGE / "inference" / "modeling_confu.py")
    assert {Path(file).stem for file in copied} | {"modeling_confu"} == INFERENCE


def test_importing_the_model_loads_only_inference():
    program = (
        "import sys, transformers_confu\n"
        "transformers_confu.ConFuDraftModel\n"
        "print(*{m.split('.')[1] for m in sys.modules if m.startswith('transformers_confu.')}, 'gguf' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert set(result.stdout.split()) == {"inference", "auto_classes", "False"}


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
