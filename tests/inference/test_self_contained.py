"""A saved draft needs nothing but Transformers: its own code loads, runs, and leaves other copies of it alone."""

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, GenerationMixin

from helpers import make_tiny_draft, make_tiny_target
from hub_stand_in import fill_hub_cache
from transformers_confu import ConFuDraftModel
from transformers_confu.publishing.publish import write_custom_generate


IDS = [[1, 5, 9, 33]]
PROMPT = torch.tensor(IDS)
GREEDY = {"max_new_tokens": 24, "do_sample": False}


@pytest.fixture(scope="module")
def target():
    return make_tiny_target()


@pytest.fixture(scope="module")
def plain(target) -> list[int]:
    return target.generate(PROMPT, **GREEDY)[0].tolist()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, target) -> Path:
    """`one/draft` and `two/draft`: the same weights, but engines that leave "one" or "two" in `draft.engine`."""
    root = tmp_path_factory.mktemp("checkpoints")
    draft = make_tiny_draft(target)
    for name in ("one", "two"):
        draft.save_pretrained(root / name / "draft")
        code = root / name / "draft" / "decoding.py"
        first_line = "    knobs = ConFuKnobs.resolve("
        assert code.read_text().count(first_line) == 1
        code.write_text(code.read_text().replace(first_line, f"    draft.engine = {name!r}\n{first_line}"))
    return root


def run(program: str) -> list[str]:
    """The lines that a program prints in a process of its own, which shares the code cache of this one."""
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_drafts_load_and_decode_without_this_package(checkpoints, target, plain, tmp_path):
    target.save_pretrained(tmp_path / "target")
    write_custom_generate(shutil.copytree(checkpoints / "two" / "draft", tmp_path / "published"))
    printed = run(f"""
        import sys

        class NoPackage:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "transformers_confu":
                    raise ModuleNotFoundError(f"{{name}} must not be needed")

        sys.meta_path.insert(0, NoPackage())
        import torch
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin

        target = AutoModelForCausalLM.from_pretrained({str(tmp_path / "target")!r}, dtype=torch.float64)

        def load(folder):
            return AutoModel.from_pretrained(folder, trust_remote_code=True)

        def show(draft):
            ids = target.generate(torch.tensor({IDS}), assistant_model=draft, **{GREEDY})
            print(draft.engine, draft.last_statistics.rounds > 0, ids[0].tolist() == {plain})

        one, two = {str(checkpoints / "one" / "draft")!r}, {str(checkpoints / "two" / "draft")!r}
        print(AutoConfig.from_pretrained(one, trust_remote_code=True).model_type)
        first, second, again = load(one), load(two), load(one)
        for draft in (first, second, again):
            show(draft)
        first.save_pretrained({str(tmp_path / "saved again")!r})
        show(load({str(tmp_path / "saved again")!r}))
        options = {{"custom_generate": {str(tmp_path / "published")!r}, "trust_remote_code": True}}
        print(target.generate(torch.tensor({IDS}), **options, **{GREEDY})[0].tolist() == {plain})
        print(hasattr(GenerationMixin._assisted_decoding.__wrapped__, "dispatches_confu"))
    """)
    runs = ["one True True", "two True True", "one True True", "one True True"]
    assert printed == ["confu", *runs, "True", "False"]
    # Saved by its own code, it carries its own code.
    saved, original = tmp_path / "saved again", checkpoints / "one" / "draft"
    assert {file.name: file.read_bytes() for file in saved.glob("*.py")} == {
        file.name: file.read_bytes() for file in original.glob("*.py")
    }


def test_the_package_may_come_after_a_drafts_own_code(checkpoints):
    printed = run(f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        import torch
        from transformers import AutoModel, GenerationMixin

        draft = AutoModel.from_pretrained({str(checkpoints / "one" / "draft")!r}, trust_remote_code=True)
        installed = GenerationMixin._assisted_decoding
        assert not any(name.startswith("transformers_confu") for name in sys.modules)
        from helpers import make_tiny_draft, make_tiny_target

        target = make_tiny_target()
        own = make_tiny_draft(target)
        for assistant in (draft, own):
            target.generate(torch.tensor({IDS}), assistant_model=assistant, **{GREEDY})
            print(getattr(assistant, "engine", "package"), assistant.last_statistics.rounds > 0)
        print(GenerationMixin._assisted_decoding is installed)
    """)
    assert printed == ["one True", "package True", "True"]


def test_the_package_may_come_first(checkpoints, target, plain):
    own = ConFuDraftModel.from_pretrained(checkpoints / "one" / "draft")  # needs no remote code
    remote = [
        AutoModel.from_pretrained(checkpoints / name / "draft", trust_remote_code=True) for name in ("one", "two")
    ]
    for draft, engine in ((own, None), (remote[0], "one"), (remote[1], "two"), (own, None)):
        assert target.generate(PROMPT, assistant_model=draft, **GREEDY)[0].tolist() == plain
        assert getattr(draft, "engine", None) == engine
    assert not hasattr(GenerationMixin._assisted_decoding.__wrapped__, "dispatches_confu")


@pytest.mark.usefixtures("offline_hub")
def test_a_revision_pins_code_and_weights(checkpoints, target, plain, tmp_path):
    folders = {"main": checkpoints / "one" / "draft", "v2": checkpoints / "two" / "draft"}
    commits = fill_hub_cache(tmp_path, "org/draft", folders)
    hub = {"cache_dir": tmp_path, "local_files_only": True, "trust_remote_code": True}
    engines = {None: "one", "v2": "two", commits["v2"]: "two", commits["main"]: "one"}
    drafts = [AutoModel.from_pretrained("org/draft", revision=revision, **hub) for revision in engines]
    for draft, engine in zip(drafts, engines.values(), strict=True):  # all at once, side by side
        assert target.generate(PROMPT, assistant_model=draft, **GREEDY)[0].tolist() == plain
        assert draft.engine == engine
    # What came from the Hub is as self-contained when it is saved.
    draft.save_pretrained(tmp_path / "saved")
    again = AutoModel.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert again.config.auto_map["AutoModel"] == "modeling_confu.ConFuDraftModel"


def test_a_draft_loaded_with_its_own_code_says_how_to_use_it(checkpoints, tmp_path):
    """Also from a repository with a `custom_generate`, which Transformers would put in the place of `generate`."""
    folder = shutil.copytree(checkpoints / "one" / "draft", tmp_path / "with custom_generate")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("def generate(model, **arguments): pass\n")
    draft = AutoModel.from_pretrained(folder, trust_remote_code=True)
    with pytest.raises(TypeError, match=r"call `target.generate\(\*\*inputs, assistant_model=draft\)`"):
        draft.generate(PROMPT)
