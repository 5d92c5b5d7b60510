"""Targets and drafts by name: how they are loaded, in which dtype, and the sentences when they cannot be."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from helpers import make_tiny_draft, make_tiny_target
from transformers_confu.common import loading
from transformers_confu.common.loading import (
    DEMO_DRAFT,
    TargetOptions,
    default_draft,
    default_dtype,
    load_draft,
    load_target,
    load_target_config,
)
from transformers_confu.training import ConFuTrainingArguments


EPYC_9004 = {"avx512_f": True, "avx512_bf16": True, "amx_bf16": False}
SKYLAKE_X = {"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}
GRAVITON_3 = {"neon": True, "bf16": True}


@pytest.fixture
def cpu(monkeypatch):
    """Lets torch believe that it runs on such a CPU, without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return lambda capabilities: (
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
        if capabilities
        else monkeypatch.delattr(torch.cpu, "get_capabilities")
    )


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [(EPYC_9004, "bfloat16"), (SKYLAKE_X, "float32"), (GRAVITON_3, "bfloat16"), (None, "float32")],  # older torch
)
def test_bf16_where_the_cpu_computes_in_it(cpu, capabilities, dtype):
    cpu(capabilities)
    assert default_dtype() == default_dtype("cpu") == default_dtype(torch.device("cpu")) == dtype


@pytest.mark.parametrize(("native", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_a_gpu_counts_before_the_cpu(monkeypatch, native, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    # An older GPU emulates bf16, slowly.
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation
    )
    assert default_dtype() == default_dtype("cuda:1") == dtype


def test_training_in_emulated_bf16_warns(cpu, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers_confu"), "propagate", True)
    for capabilities, bf16 in ((EPYC_9004, True), (SKYLAKE_X, False), (SKYLAKE_X, True)):
        assert "Leave it out (`--bf16 false`)" not in caplog.text
        cpu(capabilities)
        ConFuTrainingArguments(output_dir=str(tmp_path), bf16=bf16, use_cpu=True)
    assert "Leave it out (`--bf16 false`)" in caplog.text


@pytest.fixture
def target_folder(tmp_path, monkeypatch):
    """A tiny target on disk. It has no tokenizer, so that is a mark."""
    monkeypatch.setattr(loading, "load_tokenizer", lambda name, trust_remote_code=False: (name, trust_remote_code))
    make_tiny_target(dtype=torch.float32).save_pretrained(tmp_path / "target")
    return tmp_path / "target"


def test_split_and_offloaded_targets_answer_with_a_draft(target_folder, tmp_path):
    """Every command loads its target like this; `.to(device)` afterwards would fail."""
    draft = make_tiny_draft(make_tiny_target(dtype=torch.float32))
    ids = torch.tensor([[1, 5, 9]])
    whole, tokenizer = load_target(str(target_folder), "float32", "cpu")
    assert whole.dtype == torch.float32 and not whole.training and tokenizer == (str(target_folder), False)
    plain = whole.generate(ids, max_new_tokens=12, do_sample=False)
    split = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu"}
    split |= dict.fromkeys(("model.layers.3", "model.layers.4", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    for device_map in (split, json.dumps(split)):
        target, _ = load_target(
            str(target_folder), "float32", device_map=device_map, offload_folder=str(tmp_path / "offload")
        )
        assert target.hf_device_map["model.layers.1"] == "disk"
        assert torch.equal(target.generate(ids, assistant_model=draft, max_new_tokens=12, do_sample=False), plain)


def test_a_target_with_code_of_its_own_is_loaded_only_if_allowed(target_folder):
    (target_folder / "configuration_mine.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
    )
    (target_folder / "modeling_mine.py").write_text(
        "from transformers import LlamaForCausalLM\n\nfrom .configuration_mine import MineConfig\n\n\n"
        "class MineForCausalLM(LlamaForCausalLM):\n    config_class = MineConfig\n"
    )
    path = target_folder / "config.json"
    config = json.loads(path.read_text())
    auto_map = {"AutoConfig": "configuration_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    path.write_text(json.dumps(config | {"model_type": "mine", "auto_map": auto_map}))
    for refused in (lambda: load_target(str(target_folder), "float32"), lambda: load_target_config(target_folder)):
        with pytest.raises(ValueError, match="comes with code of its own. Read it, .* --trust_remote_code"):
            refused()
    target, tokenizer = TargetOptions(trust_remote_code=True).load(str(target_folder), "float32")
    assert type(target).__name__ == "MineForCausalLM" and tokenizer[1]
    assert load_target_config(target_folder, trust_remote_code=True).model_type == "mine"


def test_what_cannot_be_loaded_is_named(tmp_path, offline_hub):
    for load in (lambda name: load_target(name, "float32"), load_draft, load_target_config):
        with pytest.raises(ValueError, match="nothing is no folder and cannot be had from the Hub"):
            load(str(tmp_path / "nothing"))
        with pytest.raises(ValueError, match="holds no (target|draft) that can be read"):
            load(str(tmp_path))
    with pytest.raises(ValueError, match="expected the name of a torch dtype"):
        load_target(str(tmp_path), "nothing")
    with pytest.raises(ValueError, match="give one of the two"):
        TargetOptions(device="cpu", device_map="auto")
    with pytest.raises(ValueError, match="device_map is .*, expected a JSON object"):
        load_target(str(tmp_path), "float32", device_map="{")


def test_the_demo_draft_is_found_in_a_clone_or_named_on_the_hub(tmp_path, monkeypatch, offline_hub):
    repository = Path(loading.__file__).parents[3]
    assert default_draft() == str(repository / "hub_cards" / "confu-smollm2-135m-instruct")
    # As after `pip install .`: the package lies somewhere else.
    monkeypatch.setattr(loading, "__file__", str(tmp_path / "site-packages" / "a" / "b" / "loading.py"))
    monkeypatch.chdir(tmp_path)
    assert default_draft() == DEMO_DRAFT
    with pytest.raises(ValueError, match="A clone of transformers-confu holds it"):
        load_draft(default_draft())
    clone = tmp_path / "clone"
    shutil.copytree(
        repository / "hub_cards" / "confu-smollm2-135m-instruct", clone / "hub_cards" / DEMO_DRAFT.split("/")[1]
    )
    (clone / "docs").mkdir()
    monkeypatch.chdir(clone / "docs")
    assert default_draft() == str(clone / "hub_cards" / "confu-smollm2-135m-instruct")
