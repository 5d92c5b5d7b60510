"""What lies in hub_cards/ and beside the recipes: code by links, an honest card, configurations that fit."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import transformers_confu
from helpers import make_tiny_draft, make_tiny_target
from transformers_confu import ConFuConfig
from transformers_confu.common.loading import load_draft
from transformers_confu.publishing.model_card import CARD_FILE, CardFacts
from transformers_confu.publishing.publish import write_card


ROOT = Path(__file__).parents[2]
SMOLLM2 = ROOT / "hub_cards" / "confu-smollm2-135m-instruct"
INFERENCE = Path(transformers_confu.__file__).parent / "inference"


def test_the_code_of_a_folder_is_links_to_the_one_source():
    links = {file.relative_to(SMOLLM2): file for file in SMOLLM2.rglob("*.py")}
    sources = {file.relative_to(INFERENCE): file for file in INFERENCE.rglob("*.py") if file.name != "__init__.py"}
    assert links.keys() == sources.keys(), "run `make cards`"
    for name, link in links.items():
        assert link.is_symlink() and not os.path.isabs(os.readlink(link)), name
        assert link.resolve() == sources[name], name


def test_a_clone_decodes_by_its_links_without_this_package(tmp_path):
    """The layout of a clone with a tiny draft in it, both ways of using it, in a process that cannot import us."""
    clone, target = tmp_path / "clone", make_tiny_target(dtype=torch.float32)
    folder = clone / "hub_cards" / "draft"
    shutil.copytree(INFERENCE, clone / "src" / "transformers_confu" / "inference")
    shutil.copytree(SMOLLM2, folder, symlinks=True, ignore=shutil.ignore_patterns("*.safetensors", "*.json"))
    draft = make_tiny_draft(target)
    draft.save_pretrained(tmp_path / "saved")
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copyfile(tmp_path / "saved" / name, folder / name)
    assert (folder / "modeling_confu.py").is_symlink()
    target.save_pretrained(tmp_path / "target")
    program = textwrap.dedent(f"""
        import sys
        sys.modules["transformers_confu"] = None
        import torch
        from transformers import AutoModel, AutoModelForCausalLM

        target = AutoModelForCausalLM.from_pretrained({str(tmp_path / "target")!r})
        ids, options = torch.tensor([[1, 5, 9, 33]]), {{"max_new_tokens": 24, "do_sample": False}}
        plain = target.generate(ids, **options)
        draft = AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True)
        print(torch.equal(target.generate(ids, assistant_model=draft, **options), plain))
        print(draft.last_statistics.rounds > 0)
        by_name = target.generate(ids, custom_generate={str(folder)!r}, trust_remote_code=True, **options)
        print(torch.equal(by_name, plain))
    """)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.split() == ["True", "True", "True"], result.stderr


def test_the_shipped_card_is_the_one_that_its_facts_make(tmp_path):
    for name in (CARD_FILE, "config.json", "generation_config.json"):
        shutil.copyfile(SMOLLM2 / name, tmp_path / name)
    write_card(tmp_path, CardFacts.load(tmp_path / CARD_FILE), f"transformers-confu/{SMOLLM2.name}")
    assert (tmp_path / "README.md").read_text() == (SMOLLM2 / "README.md").read_text(), "run `make cards`"


def test_the_shipped_draft_is_whole_and_small():
    draft = load_draft(SMOLLM2)
    assert draft.dtype == torch.bfloat16 and draft.num_parameters() < 15e6
    target = (draft.config.vocab_size, draft.config.target_hidden_size, draft.config.target_num_hidden_layers)
    assert target == (49152, 576, 30)


# Vocabulary, width, layers, key/value heads, their size and RoPE base, of the targets' config.json on the Hub.
RECIPES = {
    "llama-3.2-3b-instruct": (128256, 3072, 28, 8, 128, 500000.0),
    "llama-3.1-8b-instruct": (128256, 4096, 32, 8, 128, 500000.0),
    "qwen3-4b": (151936, 2560, 36, 8, 128, 1000000.0),
    "qwen3.5-4b": (248320, 2560, 32, 4, 256, 10000000.0),
    "gpt-oss-20b": (201088, 2880, 24, 8, 64, 150000.0),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipes_draft_fits_its_target(name):
    config = ConFuConfig.from_json_file(ROOT / "examples" / "recipes" / name / "draft_config.json")
    sizes = (config.vocab_size, config.target_hidden_size, config.target_num_hidden_layers)
    heads = (config.target_num_key_value_heads, config.target_head_dim)
    assert (*sizes, *heads, config.rope_parameters["rope_theta"]) == RECIPES[name]
    assert config.hidden_size == config.target_hidden_size and config.draft_vocab_size == 32000
