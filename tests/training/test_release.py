"""What a training run uploads: a complete draft with its card, no pickle, no state of the training."""

from pathlib import Path

import huggingface_hub
import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from huggingface_hub.utils import _http
from transformers import AutoModel

from commands import write_run
from helpers import make_tiny_draft, make_tiny_target
from hub_stand_in import HubServer
from transformers_confu.publishing.model_card import CardFacts
from transformers_confu.training import ConFuTrainer, ConFuTrainingArguments
from transformers_confu.training.train import main


@pytest.fixture
def hub(monkeypatch) -> HubServer:
    server = HubServer()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    before = _http._GLOBAL_CLIENT_FACTORY
    huggingface_hub.set_client_factory(server.client)
    yield server
    huggingface_hub.set_client_factory(before)


def make_trainer(folder: Path, **settings) -> ConFuTrainer:
    target = make_tiny_target(dtype=torch.float32)
    rows = Dataset.from_dict({"input_ids": [[5, 9, *[11] * 14]] * 4, "labels": [[-100, -100, *[11] * 14]] * 4})
    arguments = {
        "output_dir": str(folder / "my-draft"),
        "hub_base_model": "org/target",
        "hub_token": "hf_good",
        "hub_model_id": "org/draft",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "max_steps": 2,
        "save_strategy": "no",
    }
    arguments = ConFuTrainingArguments(**(arguments | settings))
    return ConFuTrainer(make_tiny_draft(target), target, arguments, train_dataset=rows, eval_dataset=rows)


# Beside its code; no pickle and no state of the training.
RELEASE = {"README.md", "config.json", "generation_config.json", "model.safetensors", "custom_generate/generate.py"}


def test_the_end_of_training_is_a_release(hub, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(tmp_path, push_to_hub=True, hub_private_repo=True, **settings)
    trainer.train()
    assert hub.private == {"org/draft": True}
    assert not hub.messages, "a checkpoint is no release"

    trainer.push_to_hub(language="en", license="apache-2.0", dataset="org/data", tags="mine")
    files = hub.branches["org/draft", "main"]
    code = {name for name in files if name.endswith(".py")} - RELEASE
    assert {"modeling_confu.py", "configuration_confu.py", "generation_confu.py"} <= code
    assert files.keys() - {".gitattributes"} == RELEASE | code
    assert b'REPOSITORY: str | None = "org/draft"' in files["custom_generate/generate.py"]
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == "org/target" and card.data.license == "apache-2.0"
    assert card.data.datasets == ["org/data"] and "mine" in card.data.tags and "speculative-decoding" in card.data.tags
    assert "Stage `joint`: 2 steps" in card.text
    assert "Teacher-forced on held-out rows at step 2: `tau_greedy`" in card.text
    for name in ("model.safetensors", *(name for name in files if name.endswith((".py", ".json")))):
        (tmp_path / "fetched" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fetched" / name).write_bytes(files[name])
    fetched = AutoModel.from_pretrained(tmp_path / "fetched", trust_remote_code=True)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(fetched.state_dict()[name], value), name


def test_the_command_releases_a_draft_whose_card_tells_of_the_last_evaluation(hub, saved_target, tmp_path):
    options = {"hub_model_id": "org/draft", "hub_base_model": "org/target", "hub_token": "hf_good"}
    main([write_run(tmp_path, saved_target, max_steps=1, push_to_hub=True, **options)])
    assert hub.messages.count("End of training") == 1
    card = ModelCard(hub.branches["org/draft", "main"]["README.md"].decode())
    assert "Teacher-forced on held-out rows at step 1: `tau_greedy`" in card.text


def test_a_card_says_what_is_written_by_hand_and_else_what_the_training_knows(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    path = tmp_path / "my-draft" / "card.yaml"
    CardFacts(license="mit", summary="A draft of note.").save(path)
    trainer.create_model_card(dataset="org/data")
    card = ModelCard.load(tmp_path / "my-draft" / "README.md")
    assert (card.data.license, card.data.datasets, card.data.base_model) == ("mit", ["org/data"], "org/target")
    assert "A draft of note." in card.text and "my-draft" in card.text and "Stage `joint`: 2 steps" in card.text
    CardFacts(license="mit", training="By hand.").save(path)
    trainer.create_model_card(license="apache-2.0")
    card = ModelCard.load(tmp_path / "my-draft" / "README.md")
    assert "By hand." in card.text and "Stage `joint`" not in card.text
    assert card.data.license == "apache-2.0"


def test_the_command_leaves_the_facts_of_a_card(saved_target, tmp_path):
    stages = [{"stage": "core"}, {"stage": "joint"}]
    main([write_run(tmp_path, saved_target, stages=stages, output_dir=str(tmp_path / "runs"), max_steps=1)])
    facts = CardFacts.load(tmp_path / "runs" / "joint" / "card.yaml")
    assert facts.training.index("Stage `core`: 1 steps") < facts.training.index("Stage `joint`: 1 steps")
    assert facts.base_model is None and "Teacher-forced on held-out rows at step 1" in facts.evaluation


def test_a_target_without_a_name_is_refused_before_the_training(hub, tmp_path):
    with pytest.raises(ValueError, match="this one comes from '': set `hub_base_model` to that id"):
        make_trainer(tmp_path, push_to_hub=True, hub_base_model=None)
    assert not hub.calls
