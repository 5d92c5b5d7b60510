"""What lies in hub_cards/: the code of the source tree, an honest card, and weights that load without this package."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from safetensors import safe_open

from helpers import make_tiny_draft, make_tiny_target
from transformers_confu import hub_cards


SMOLLM2 = hub_cards.HUB_CARDS / "confu-smollm2-135m-instruct"
INFERENCE_FILES = {
    "candidate_generator_confu.py",
    "configuration_confu.py",
    "draft_tree.py",
    "generation_confu.py",
    "modeling_confu.py",
    "target_runner.py",
}

shipped = pytest.mark.skipif(
    not (SMOLLM2 / "model.safetensors").is_file(), reason="the draft of the demo target is not trained yet"
)


@pytest.fixture
def cards(tmp_path) -> Path:
    """A folder like hub_cards/ with one saved tiny draft in it, `cards/tiny`."""
    make_tiny_draft(make_tiny_target()).save_pretrained(tmp_path / "cards" / "tiny")
    return tmp_path / "cards"


def test_a_saved_draft_passes_as_it_is(cards):
    assert {file.name for file in (cards / "tiny").glob("*.py")} == INFERENCE_FILES
    assert hub_cards.main(["--check"], cards) == 0


def test_check_names_the_files_that_differ_and_writes_nothing(cards, capsys):
    (cards / "tiny" / "draft_tree.py").write_text("# an edit\n")
    (cards / "tiny" / "target_runner.py").unlink()
    (cards / "tiny" / "leftover.py").touch()
    assert hub_cards.main(["--check"], cards) == 1
    printed = capsys.readouterr().out
    for name in ("draft_tree.py", "target_runner.py", "leftover.py"):
        assert f"tiny/{name}: differs" in printed
    assert printed.count("differs") == 3
    assert (cards / "tiny" / "draft_tree.py").read_text() == "# an edit\n"


def test_update_mends_code_and_touches_nothing_else(cards):
    others = {file: file.read_bytes() for file in (cards / "tiny").iterdir() if file.suffix != ".py"}
    (cards / "tiny" / "draft_tree.py").write_text("# an edit\n")
    (cards / "tiny" / "target_runner.py").unlink()
    (cards / "tiny" / "leftover.py").touch()
    assert hub_cards.main([], cards) == 0
    assert hub_cards.main(["--check"], cards) == 0
    assert {file: file.read_bytes() for file in (cards / "tiny").iterdir() if file.suffix != ".py"} == others


@pytest.mark.parametrize("auto_map", [None, {"AutoModel": "modeling_confu.ConFuDraftModel"}])
def test_a_config_that_does_not_lead_to_the_code_is_refused(cards, capsys, auto_map):
    path = cards / "tiny" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": auto_map}))
    assert hub_cards.main([], cards) == 1
    assert "expected {'AutoConfig': 'configuration_confu.ConFuConfig'" in capsys.readouterr().err
    path.unlink()
    assert hub_cards.main([], cards) == 1
    assert "config.json does not exist: save a draft into this folder" in capsys.readouterr().err


def test_outside_of_a_clone_the_command_says_so(tmp_path, capsys):
    assert hub_cards.main([], tmp_path / "hub_cards") == 1
    assert "run this in a clone" in capsys.readouterr().err


@shipped
def test_the_shipped_code_is_that_of_the_source_tree():
    assert hub_cards.main(["--check"]) == 0, "run `make cards` and commit the result"


def test_the_shipped_card_says_what_the_checkpoint_is():
    card = ModelCard.load(SMOLLM2 / "README.md")
    data = card.data.to_dict()
    assert data["license"] == "apache-2.0"
    assert data["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    # No legal value means "draft", so the key is left out.
    assert data.get("base_model_relation") in (None, "adapter", "finetune", "merge", "quantized")
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert {"speculative-decoding", "draft-model", "confu", "eagle3", "custom_code"} <= set(data["tags"])
    assert set(data) <= {
        "base_model", "datasets", "language", "library_name", "license", "metrics", "pipeline_tag", "tags"
    }  # fmt: skip
    assert "not usable alone" in card.text


@shipped
def test_the_shipped_weights_are_small_and_safe():
    assert not [file.name for file in SMOLLM2.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".pkl")]
    path = SMOLLM2 / "model.safetensors"
    assert path.stat().st_size <= 30e6
    with safe_open(path, framework="pt") as weights:
        dtypes = {name: weights.get_slice(name).get_dtype() for name in weights.keys()}
    assert {dtype for name, dtype in dtypes.items() if name not in ("d2t", "t2d")} == {"BF16"}


@shipped
def test_the_shipped_draft_fits_the_demo_target():
    config = json.loads((SMOLLM2 / "config.json").read_text(encoding="utf-8"))
    assert config["vocab_size"] == 49152
    assert (config["target_hidden_size"], config["target_num_hidden_layers"]) == (576, 30)
