"""What lies in hub_cards/: the code of the source tree, an honest card, and weights that load without this package."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen3Config

from helpers import make_tiny_draft, make_tiny_target
from transformers_confu import ConFuConfig, ConFuDraftModel
from transformers_confu.inference.checks import check_target
from transformers_confu.publishing import hub_cards
from transformers_confu.publishing.model_card import CARD_FILE, CardFacts


SMOLLM2 = hub_cards.HUB_CARDS / "confu-smollm2-135m-instruct"
INFERENCE_FILES = {
    "candidate_generator_confu.py",
    "configuration_confu.py",
    "draft_tree.py",
    "generation_confu.py",
    "modeling_confu.py",
    "target_runner.py",
}
FACTS = CardFacts(base_model="org/target", license="mit")

every_folder = pytest.mark.parametrize("name", sorted(path.name for path in hub_cards.HUB_CARDS.iterdir()))
untrained = pytest.mark.parametrize("name", sorted(hub_cards.UNTRAINED))


@pytest.fixture
def cards(tmp_path) -> Path:
    """A folder like hub_cards/ with one saved tiny draft in it, `cards/tiny`."""
    make_tiny_draft(make_tiny_target()).save_pretrained(tmp_path / "cards" / "tiny")
    FACTS.save(tmp_path / "cards" / "tiny" / CARD_FILE)
    return tmp_path / "cards"


def test_a_saved_draft_lacks_only_its_card_and_custom_generate(cards, capsys):
    assert {file.name for file in (cards / "tiny").glob("*.py")} == INFERENCE_FILES
    assert hub_cards.main([], cards) == 0
    written = capsys.readouterr().out.splitlines()
    assert written == ["tiny/README.md: written", "tiny/custom_generate/generate.py: written"]
    assert hub_cards.main(["--check"], cards) == 0
    assert (
        'REPOSITORY: str | None = "transformers-confu/tiny"'
        in (cards / "tiny" / "custom_generate" / "generate.py").read_text()
    )
    assert ModelCard.load(cards / "tiny" / "README.md").data.base_model == "org/target"


def test_check_names_the_files_that_differ_and_writes_nothing(cards, capsys):
    hub_cards.main([], cards)
    capsys.readouterr()
    (cards / "tiny" / "draft_tree.py").write_text("# an edit\n")
    (cards / "tiny" / "target_runner.py").unlink()
    (cards / "tiny" / "leftover.py").touch()
    CardFacts("org/target", "apache-2.0").save(cards / "tiny" / CARD_FILE)
    assert hub_cards.main(["--check"], cards) == 1
    printed = capsys.readouterr().out
    for name in ("draft_tree.py", "target_runner.py", "leftover.py", "README.md"):
        assert f"tiny/{name}: differs" in printed
    assert printed.count("differs") == 4
    assert (cards / "tiny" / "draft_tree.py").read_text() == "# an edit\n"


def test_update_mends_code_and_touches_nothing_else(cards):
    hub_cards.main([], cards)
    files = [file for file in (cards / "tiny").rglob("*") if file.is_file()]
    others = {file: file.read_bytes() for file in files if file.suffix != ".py"}
    (cards / "tiny" / "draft_tree.py").write_text("# an edit\n")
    (cards / "tiny" / "target_runner.py").unlink()
    (cards / "tiny" / "leftover.py").touch()
    assert hub_cards.main([], cards) == 0
    assert hub_cards.main(["--check"], cards) == 0
    assert {file: file.read_bytes() for file in others} == others
    assert sorted(file for file in (cards / "tiny").rglob("*") if file.is_file()) == sorted(files)


@pytest.mark.parametrize("auto_map", [None, {"AutoModel": "modeling_confu.ConFuDraftModel"}])
def test_a_config_that_does_not_lead_to_the_code_is_refused(cards, capsys, auto_map):
    path = cards / "tiny" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": auto_map}))
    assert hub_cards.main([], cards) == 1
    assert "expected {'AutoConfig': 'configuration_confu.ConFuConfig'" in capsys.readouterr().err
    path.unlink()
    assert hub_cards.main([], cards) == 1
    assert "config.json does not exist: save a draft into this folder" in capsys.readouterr().err


def test_a_folder_without_facts_or_with_false_ones_is_refused(cards, capsys):
    (cards / "tiny" / CARD_FILE).unlink()
    assert hub_cards.main([], cards) == 1
    assert "card.yaml does not exist. A card needs at least" in capsys.readouterr().err
    CardFacts("org/target", "mit", untrained=True).save(cards / "tiny" / CARD_FILE)
    assert hub_cards.main([], cards) == 1
    assert "says `untrained`, but no target config is known for tiny" in capsys.readouterr().err


def test_outside_of_a_clone_the_command_says_so(tmp_path, capsys):
    assert hub_cards.main([], tmp_path / "hub_cards") == 1
    assert "run this in a clone" in capsys.readouterr().err


# What is shipped


def test_the_shipped_files_are_what_is_generated():
    assert hub_cards.main(["--check"]) == 0, "run `make cards` and commit the result"


@every_folder
def test_a_shipped_card_says_what_the_checkpoint_is(name):
    card = ModelCard.load(hub_cards.HUB_CARDS / name / "README.md")
    facts = CardFacts.load(hub_cards.HUB_CARDS / name / CARD_FILE)
    data = card.data.to_dict()
    assert data["base_model"] == facts.base_model
    # No legal value means "draft".
    assert data["base_model_relation"] in ("adapter", "finetune", "merge", "quantized")
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert {"speculative-decoding", "draft-model", "confu", "eagle3", "custom_code"} <= set(data["tags"])
    assert "not usable alone" in card.text
    assert ("**Not trained yet.**" in card.text) == (name in hub_cards.UNTRAINED)
    assert ("model-index" in data) == (name not in hub_cards.UNTRAINED)


def test_the_smollm2_draft_is_small_safe_and_complete():
    assert not [file.name for file in SMOLLM2.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".pkl")]
    path = SMOLLM2 / "model.safetensors"
    assert path.stat().st_size <= 30e6
    with safe_open(path, framework="pt") as weights:
        dtypes = {name: weights.get_slice(name).get_dtype() for name in weights.keys()}
    assert {dtype for name, dtype in dtypes.items() if name not in ("d2t", "t2d")} == {"BF16"}
    config = json.loads((SMOLLM2 / "config.json").read_text(encoding="utf-8"))
    assert config["vocab_size"] == 49152
    assert (config["target_hidden_size"], config["target_num_hidden_layers"]) == (576, 30)


@pytest.mark.slow
def test_the_smollm2_draft_decodes_by_its_folders_name(smollm2):
    target, tokenizer = smollm2
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Name the planets of the solar system."}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    options = {"max_new_tokens": 48, "do_sample": False}
    plain = target.generate(**inputs, **options)
    assert torch.equal(
        target.generate(**inputs, **options, custom_generate=str(SMOLLM2), trust_remote_code=True), plain
    )


# Of https://huggingface.co/<target>/raw/main/config.json, what a target's memory and a draft's sizes depend on.
TARGETS = {
    "confu-llama-3.2-3b-instruct": (LlamaConfig, 128256, 3072, 28, 24, 8, 128, 8192, 3.21),
    "confu-llama-3.1-8b-instruct": (LlamaConfig, 128256, 4096, 32, 32, 8, 128, 14336, 8.03),
    "confu-qwen3-4b": (Qwen3Config, 151936, 2560, 36, 32, 8, 128, 9728, 4.02),
}


@untrained
def test_an_untrained_draft_fits_its_target(name):
    folder = hub_cards.HUB_CARDS / name
    assert not list(folder.glob("*.safetensors"))
    config_class, vocab_size, hidden_size, layers, heads, kv_heads, head_dim, intermediate, billions = TARGETS[name]
    target_config = config_class(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate,
        tie_word_embeddings=name != "confu-llama-3.1-8b-instruct",
    )
    with torch.device("meta"):
        target = AutoModelForCausalLM.from_config(target_config)
    # The sizes are those of the model of that name.
    assert sum(parameter.numel() for parameter in target.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)

    config = ConFuConfig.from_pretrained(folder)
    check_target(target, config)
    assert (config.target_num_key_value_heads, config.target_head_dim) == (kv_heads, head_dim)
    assert config.draft_vocab_size == 32000
    remote = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert remote.to_dict() | {"_name_or_path": ""} == config.to_dict()
    # Training starts from this config as it is.
    with torch.device("meta"):
        draft = ConFuDraftModel(config)
    assert draft.lm_head.weight.shape == (32000, hidden_size)
