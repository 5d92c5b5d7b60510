"""`AutoConfig`, `AutoModel` and pipelines read a draft without a question where this package is imported."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, pipeline

from helpers import letter_tokenizer, make_tiny_draft, make_tiny_target
from transformers_confu import ConFuConfig, ConFuDraftModel


@pytest.fixture(scope="module")
def target():
    return make_tiny_target()


@pytest.fixture(scope="module")
def folder(target, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "draft"
    make_tiny_draft(target).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def ask_nobody(monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE", 0)


@pytest.mark.parametrize("trust", [None, False])
def test_the_installed_classes_are_used(folder, trust):
    assert type(AutoConfig.from_pretrained(folder, trust_remote_code=trust)) is ConFuConfig
    draft = AutoModel.from_pretrained(folder, trust_remote_code=trust)
    assert type(draft) is ConFuDraftModel
    assert type(AutoModel.from_config(draft.config)) is ConFuDraftModel


def test_trusted_code_of_a_folder_goes_first(folder):
    draft = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(draft).__module__.startswith("transformers_modules.")


def test_a_pipeline_takes_the_name_of_a_draft(target, folder):
    tokenizer = letter_tokenizer()
    tokenizer.save_pretrained(folder)
    options = {"model": target, "tokenizer": tokenizer, "dtype": torch.float64}
    settings = {"max_new_tokens": 12, "do_sample": False}
    assisted = pipeline("text-generation", **options, assistant_model=str(folder))
    assert type(assisted.assistant_model) is ConFuDraftModel
    assert assisted("abc", **settings) == pipeline("text-generation", **options)("abc", **settings)
    assert assisted.assistant_model.last_statistics.rounds > 0


@pytest.mark.parametrize("first", ["transformers_confu", "transformers.models.auto.configuration_auto"])
def test_either_package_may_be_imported_first(folder, first):
    program = f"""
        import sys
        import {first}
        import transformers_confu
        if {first!r} == "transformers_confu":
            assert not {{"torch", "transformers"}} & sys.modules.keys()  # importing this package costs nothing
        from transformers import AutoModel
        print(type(AutoModel.from_pretrained({str(folder)!r})).__module__)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["transformers_confu.inference.modeling_confu"]
