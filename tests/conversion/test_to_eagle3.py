"""Round trips through the forms of other libraries, and what they cannot express."""

import copy
import json
import logging
import os
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from eagle3_source import Source
from helpers import make_tiny_draft, make_tiny_target
from transformers_confu import ConFuDraftModel, cli
from transformers_confu.conversion import convert_eagle3, export_eagle3


@pytest.fixture(scope="module")
def target():
    return make_tiny_target(num_hidden_layers=8, eos_token_id=[2, 5])


def table(width: int = 32) -> torch.Tensor:
    return torch.randn(97, width, generator=torch.Generator().manual_seed(8), dtype=torch.float64)


def targets_table() -> torch.Tensor:
    return make_tiny_target(num_hidden_layers=8).get_input_embeddings().weight.detach().clone()


SOURCES = {
    "flat": Source("flat", (1, 2, 4, 5, 7), norm_before_fc=True, linear_factor=4.0),
    "flat, narrow": Source("flat", (2, 4, 6), hidden_size=24, head_dim=10, embeddings=table(24)),
    "flat, full vocabulary": Source("flat", (2, 4, 6), draft_vocab_size=None),
    "flat, EAGLE-3.1": Source("flat", (2, 4, 6), fc_norm=True, norm_output=True),
    "speculators": Source("speculators", (2, 4, 6), norm_before_residual=True, embeddings=targets_table()),
    "speculators, every switch": Source(
        "speculators", (1, 2, 5), norm_output=True, fc_norm=True, qk_norm=True, bias=True, embeddings=table()
    ),
    "speculators, wide": Source("speculators", (2, 4, 6), hidden_size=40, linear_factor=2.0, embeddings=table(40)),
}
FORMS = {"flat": "sglang", "speculators": "speculators"}


def read_folder(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


ROUNDS = [(name, form) for name, source in SOURCES.items() for form in sorted({FORMS[source.form], "speculators"})]


@pytest.mark.parametrize("name, form", ROUNDS)
def test_in_and_out_and_in_again(name, form, target, tmp_path):
    source = SOURCES[name]
    source.write(tmp_path / "source")
    draft = convert_eagle3(tmp_path / "source", target)
    export_eagle3(draft, tmp_path / "out", form, target)
    again = convert_eagle3(tmp_path / "out", target)
    assert again.config.to_dict() == draft.config.to_dict()
    state = again.state_dict()
    for key, tensor in draft.state_dict().items():
        if not key.startswith("future_channel."):
            assert torch.equal(state[key], tensor) and state[key].dtype == tensor.dtype, key
    if form != FORMS[source.form]:
        return
    # In its own form, the source itself comes back.
    config, weights = read_folder(tmp_path / "source")
    out_config, out_weights = read_folder(tmp_path / "out")
    assert out_weights.keys() == weights.keys()
    assert all(torch.equal(out_weights[name], tensor) for name, tensor in weights.items())
    layer, out_layer = (c.get("transformer_layer_config", c) for c in (config, out_config))
    # Of the length, the greater is written: a draft's own may only be that of its training.
    assert (layer["max_position_embeddings"], out_layer["max_position_embeddings"]) == (64, 512)
    assert (out_layer["eos_token_id"], out_layer["bos_token_id"]) == ([2, 5], 1)


def test_the_words_of_the_forms(target, tmp_path):
    draft = make_tiny_draft(target, draft_vocab_size=40, target_hidden_state_indices=[2, 4, 5])
    export_eagle3(draft, tmp_path / "sglang", "sglang")
    config, weights = read_folder(tmp_path / "sglang")
    assert config["architectures"] == ["LlamaForCausalLMEagle3"] and config["model_type"] == "llama"
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 3, 4]  # outputs of layers
    assert (config["vocab_size"], config["draft_vocab_size"], config["num_hidden_layers"]) == (97, 40, 1)
    assert (config["rope_theta"], config["rope_scaling"], config["torch_dtype"]) == (10000.0, None, "float64")
    assert "midlayer.self_attn.q_proj.weight" in weights and "embed_tokens.weight" not in weights
    assert not any(name.startswith(("layers.", "future_channel.")) for name in weights)

    export_eagle3(draft, tmp_path / "speculators", "speculators", target)
    config, weights = read_folder(tmp_path / "speculators")
    assert "model_type" not in config and config["speculators_model_type"] == "eagle3"
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]  # inputs of layers
    assert config["norm_before_residual"] is False  # which readers would else take for true
    assert config["transformer_layer_config"]["vocab_size"] == 97 and config["draft_vocab_size"] == 40
    proposal = config["speculators_config"]["proposal_methods"][0]
    assert proposal["speculative_tokens"] == 6  # a draft without knobs of its own
    assert config["speculators_config"]["verifier"]["architectures"] == ["LlamaForCausalLM"]
    assert torch.equal(weights["embed_tokens.weight"], target.get_input_embeddings().weight)
    assert "layers.0.self_attn.q_proj.weight" in weights


ROPE = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("rope_type", ROPE)
@pytest.mark.parametrize("form", ["sglang", "speculators"])
def test_rope_stands_in_the_words_of_every_reader(form, rope_type, target, tmp_path, caplog):
    rope = {"rope_type": rope_type, "rope_theta": 5e5} | ROPE[rope_type]
    draft = make_tiny_draft(target, rope_parameters=rope)
    with caplog.at_level(logging.WARNING):
        export_eagle3(draft, tmp_path / "out", form, target)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    layer = written.get("transformer_layer_config", written)
    # Transformers 5, of the whole file and of the new words alone.
    new_words = {name: value for name, value in layer.items() if name not in ("rope_theta", "rope_scaling")}
    for config in (layer, new_words):
        rotary = LlamaRotaryEmbedding(LlamaConfig.from_dict(copy.deepcopy(config)))  # which changes what it is given
        assert torch.equal(rotary.inv_freq, draft.rotary_emb.inv_freq.float())
    # Transformers 4 and SGLang read these two words only.
    assert layer["rope_theta"] == 5e5
    scaling = layer["rope_scaling"]
    if rope_type == "llama3":
        assert scaling == {"rope_type": "llama3"} | ROPE["llama3"]
    else:  # what SafeAILab's class accepts: nothing, or a dictionary of exactly `type` and `factor`, a float above 1
        assert scaling == (None if rope_type == "default" else {"type": "linear", "factor": 4.0})
    assert ("SafeAILab's own code knows only 'linear'" in caplog.text) == (rope_type == "llama3" and form == "sglang")


@pytest.mark.parametrize("name, named", [("org/target", True), ("folder/target", False)])
def test_the_card_names_a_target_of_the_hub_only(target, tmp_path, monkeypatch, name, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder" / "target").mkdir(parents=True)
    monkeypatch.setattr(target.config, "_name_or_path", name)
    mask = os.umask(0o022)
    export_eagle3(make_tiny_draft(target), tmp_path / "out", "speculators", target)
    os.umask(mask)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.base_model == name) == named == (f"`{name}`" in card.text)
    assert "**ConFu's future channel is not in it**" in card.text and {"eagle3", "speculators"} <= set(card.data.tags)
    # safetensors itself gives weights to nobody but their owner.
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o644}


REFUSED = [
    (
        {"use_qk_norm": True, "mlp_bias": True},
        "sglang",
        "has mlp_bias, use_qk_norm, which SGLang does not know; use the",
    ),
    ({"norm_before_residual": True}, "sglang", "has norm_before_residual, which SGLang"),
    ({"attention_bias": True}, "sglang", "has attention_bias, which SGLang"),
    ({"has_own_embeddings": True}, "sglang", "SGLang would replace them by the target's"),
    ({"target_hidden_state_indices": [0, 2]}, "sglang", "taps the hidden states [0, 2]"),
    ({"target_hidden_state_indices": [2, 8]}, "speculators", "taps the hidden states [2, 8]"),
    ({}, "speculators", "holds the target's embeddings, and this draft has none of its own"),
    ({}, "gguf", "`format` is 'gguf'; it must be 'sglang' or 'speculators'."),
]


@pytest.mark.parametrize("overrides, form, sentence", REFUSED)
def test_what_a_form_cannot_express_is_refused(overrides, form, sentence, target, tmp_path):
    with pytest.raises(ValueError) as error:
        export_eagle3(make_tiny_draft(target, **overrides), tmp_path / "out", form)
    assert sentence in str(error.value)
    assert not (tmp_path / "out").exists()


# The command


def main(arguments: list[str]) -> int:
    return cli.main(["convert", *arguments])


def test_the_command_converts_in_and_out(target, tmp_path, capsys):
    source = Source("flat", (2, 4, 6), norm_output=True)
    source.write(tmp_path / "source")
    target.save_pretrained(tmp_path / "target")
    folders = {name: str(tmp_path / name) for name in ("source", "target", "draft", "out")}
    options = ["--dtype", "float32", "--num-soft-prompts", "3", "--norm_output=false", "--taps", "1", "3", "5"]
    options.append("--rotate-soft-prompts")
    into = ["in", folders["source"], "--target", folders["target"], "--output", folders["draft"], *options]
    assert main(into) == 0
    assert "taps [1, 3, 5], draft vocabulary 40 of 97" in capsys.readouterr().out
    draft = ConFuDraftModel.from_pretrained(tmp_path / "draft")
    assert draft.dtype == torch.float32 and draft.config.num_soft_prompts == 3 and not draft.config.norm_output
    assert draft.config.rotate_soft_prompts
    assert torch.equal(draft.fc.weight, source.weights()["fc.weight"].float())

    assert main(into) == 1  # not written twice
    assert "is not empty" in capsys.readouterr().err
    out = ["out", folders["draft"], "--output", folders["out"], "--format", "speculators"]
    assert main([*out, "--target", folders["target"]]) == 0
    assert "without the future channel" in capsys.readouterr().out
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["fc.weight"], draft.fc.weight)
