"""What is refused on the way in, each with a sentence that names the cause, and what is warned of."""

import json
import logging
import os

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from eagle3_source import Source, write_checkpoint
from helpers import make_tiny_target
from transformers_confu.conversion import checkpoints, convert_eagle3


@pytest.fixture(scope="module")
def target():
    return make_tiny_target(num_hidden_layers=8, eos_token_id=[2, 5], pad_token_id=0)


def flat(**changes) -> Source:
    return Source("flat", (2, 4, 6), **changes)


def refusal(folder, target, **overrides) -> str:
    with pytest.raises(ValueError) as error:
        convert_eagle3(folder, target, **overrides)
    return str(error.value)


# Files


@pytest.mark.parametrize(
    "files, damaged",
    [
        ("safetensors", "model.safetensors"),
        ("shards", "model-00002-of-00002.safetensors"),
        ("bin", "pytorch_model.bin"),
    ],
)
def test_a_truncated_file(tmp_path, target, files, damaged):
    path = flat().write(tmp_path, files) / damaged
    content = path.read_bytes()
    for kept in (0.99, 0.0):
        path.write_bytes(content[: int(kept * len(content))])
        message = refusal(tmp_path, target)
        assert damaged in message and "damaged" in message


def test_a_missing_shard_and_an_index_that_leads_out_of_the_folder(tmp_path, target):
    """A shard is looked for beside its index only."""
    flat().write(tmp_path / "source", "shards")
    (tmp_path / "source" / "model-00001-of-00002.safetensors").rename(tmp_path / "model-00001-of-00002.safetensors")
    index = tmp_path / "source" / "model.safetensors.index.json"
    for name in ("model-00001", "../model-00001"):
        index.write_text(index.read_text().replace("model-00001", name))
        message = refusal(tmp_path / "source", target)
        assert "names the file model-00001-of-00002.safetensors, which is not in" in message


def test_missing_files_and_invalid_json(tmp_path, target):
    assert "'no/such/folder' is neither a folder nor the id of a Hub repository." in refusal("no/such/folder", target)
    assert "holds no config.json" in refusal(tmp_path, target)
    (tmp_path / "config.json").write_text('{"hidden_size": 3')
    assert "is no valid JSON" in refusal(tmp_path, target)
    (tmp_path / "config.json").write_text("[]")
    assert "holds a list, expected an object" in refusal(tmp_path, target)
    (tmp_path / "config.json").write_text("{}")
    assert "holds no weights; expected model.safetensors or pytorch_model.bin" in refusal(tmp_path, target)


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_may_hold_nothing_but_tensors(tmp_path, target):
    proof = tmp_path / "was run"
    flat().write(tmp_path / "source", "bin")
    file = tmp_path / "source" / "pytorch_model.bin"
    torch.save({"fc.weight": torch.zeros(1), "payload": Payload(proof)}, file)
    message = refusal(tmp_path / "source", target)
    assert "pytorch_model.bin holds more than tensors or is damaged; it was not run." in message
    assert not proof.exists()
    torch.load(file, weights_only=False)  # it would have run
    assert proof.exists()
    torch.save({"model": {"fc.weight": torch.zeros(1)}}, file)
    assert "holds no plain dictionary of tensors" in refusal(tmp_path / "source", target)


def test_a_repository_is_downloaded_with_pickles_only_where_there_is_nothing_better(tmp_path, target, monkeypatch):
    asked = []

    def snapshot_download(repository, allow_patterns, revision):
        asked.append((repository, revision, allow_patterns))
        return str(tmp_path / repository.replace("/", "--"))

    monkeypatch.setattr(checkpoints, "snapshot_download", snapshot_download)
    for files, patterns in (
        ("safetensors", [["*.json", "*.safetensors"]]),
        ("shards", [["*.json", "*.safetensors"]]),
        ("bin", [["*.json", "*.safetensors"], ["*.json", "pytorch_model*.bin"]]),
    ):
        flat().write(tmp_path / f"org--{files}", files)
        asked.clear()
        draft = convert_eagle3(f"org/{files}", target, hub_arguments={"revision": "v1"})
        assert draft.config.target_hidden_state_indices == [2, 4, 6]
        assert asked == [(f"org/{files}", "v1", wanted) for wanted in patterns]


# Weights


def changed_weights(source: Source, change) -> dict[str, torch.Tensor]:
    weights = {name.replace("layers.0.", "midlayer."): tensor for name, tensor in source.weights().items()}
    change(weights)
    return weights


WRONG_WEIGHTS = {
    "missing": (
        lambda w: [w.pop(name) for name in ("midlayer.mlp.up_proj.weight", "norm.weight")],
        "lacks weights of an EAGLE-3 draft with its config: layers.0.mlp.up_proj.weight, norm.weight.",
    ),
    "of EAGLE-1": (
        lambda w: [w.pop(name) for name in ("midlayer.hidden_norm.weight", "lm_head.weight")],
        "It looks like a draft of EAGLE-1 or 2",
    ),
    "unexpected": (
        lambda w: w.update({"mask_hidden": torch.zeros(1, 96), "fc.bias": torch.zeros(32)}),
        "has weights that an EAGLE-3 draft with its config has not: fc.bias, mask_hidden.",
    ),
    "the layer twice": (
        lambda w: w.update({"layers.0.hidden_norm.weight": w["midlayer.hidden_norm.weight"].clone()}),
        "holds layers.0.hidden_norm.weight twice, under two names.",
    ),
    "another shape": (
        lambda w: w.update({"midlayer.self_attn.q_proj.weight": torch.zeros(32, 32)}),
        "layers.0.self_attn.q_proj.weight is (32, 32), expected (32, 64)",
    ),
    "a tap less": (
        lambda w: w.update({"fc.weight": torch.zeros(32, 64)}),
        "`fc.weight` reads 64 numbers, but the 3 taps [2, 4, 6] of a target of width 32 have 96.",
    ),
    "quantised": (
        lambda w: w.update({"lm_head.weight": torch.zeros(40, 32, dtype=torch.int8)}),
        "The source's lm_head.weight are integers",
    ),
    "biases of some": (
        lambda w: w.update({f"midlayer.self_attn.{n}_proj.bias": torch.zeros(s) for n, s in (("q", 32), ("k", 16))}),
        "lacks weights of an EAGLE-3 draft with its config: layers.0.self_attn.o_proj.bias",
    ),
    "no d2t": (lambda w: w.pop("d2t"), "predicts 40 of 97 tokens, but has no `d2t`"),
    "d2t of ids": (
        lambda w: w.update({"d2t": w["d2t"] + torch.arange(40)}),
        "`d2t` holds token ids, expected offsets",
    ),
    "d2t out of order": (
        lambda w: w.update({"d2t": (w["d2t"] + torch.arange(40)).flip(0) - torch.arange(40)}),
        "`d2t` and `t2d` name different tokens",
    ),
    "d2t alone, beyond the vocabulary": (
        lambda w: (w.pop("t2d"), w["d2t"][-1:].add_(97)),
        "`d2t` and `t2d` name different tokens: `d2t` leads to",
    ),
    "short d2t": (lambda w: w.update({"d2t": w["d2t"][:-1].clone()}), "`d2t` has the shape (39,), expected (40,)"),
    "d2t of floats": (lambda w: w.update({"d2t": w["d2t"].float()}), "`d2t` holds torch.float32"),
    "short t2d": (lambda w: w.update({"t2d": w["t2d"][:-1].clone()}), "`t2d` has the shape (96,), expected (97,)"),
}


@pytest.mark.parametrize("change, sentence", WRONG_WEIGHTS.values(), ids=WRONG_WEIGHTS.keys())
def test_wrong_weights(tmp_path, target, change, sentence):
    config = flat().config()
    if "o_proj.bias" in sentence:  # else refused before
        del config["attention_bias"]
    write_checkpoint(tmp_path, config, changed_weights(flat(), change))
    assert sentence in refusal(tmp_path, target)


def test_the_first_names_of_eagle_3_1_are_understood(tmp_path, target):
    source = flat(fc_norm=True)
    weights = changed_weights(source, lambda w: None)
    names = ("aux_norm_low", "aux_norm_mid", "aux_norm_high")
    weights |= {f"{name}.weight": weights.pop(f"fc_norm.{i}.weight") for i, name in enumerate(names)}
    config = source.config() | {"use_aux_norm": True}
    del config["fc_norm"]
    write_checkpoint(tmp_path, config, weights)
    draft = convert_eagle3(tmp_path, target)
    assert draft.config.fc_norm
    assert torch.equal(draft.fc_norm[2].weight, source.weights()["fc_norm.2.weight"])


def test_a_map_without_its_inverse_or_its_size_is_completed(tmp_path, target):
    config = flat().config() | {"draft_vocab_size": None}
    write_checkpoint(tmp_path, config, changed_weights(flat(), lambda w: w.pop("t2d")))
    draft = convert_eagle3(tmp_path, target)
    assert draft.config.draft_vocab_size == 40 and torch.equal(draft.d2t, flat().weights()["d2t"])
    assert torch.equal(draft.t2d, flat().weights()["t2d"])


# Config


LAYER_IDS = "eagle_aux_hidden_state_layer_ids"


def nested(ids: list[int]) -> dict:
    return {"eagle_config": {LAYER_IDS: ids}}


WRONG_CONFIGS = {
    "no sizes": ({"hidden_size": None, "intermediate_size": None}, "has no `hidden_size`, `intermediate_size`."),
    "inner size": ({"intermediate_size": 60}, "layers.0.mlp.gate_proj.weight is (56, 32), expected (60, 32)"),
    "draft vocabulary": ({"draft_vocab_size": 50}, "`d2t` has the shape (40,), expected (50,)"),
    "vocabulary": ({"vocab_size": 100}, "made for a target with `vocab_size=100`, but this one has 97"),
    "width of the target": ({"target_hidden_size": 48}, "a target with `hidden_size=48`, but this one has 32"),
    "swapped layer ids": (nested([3, 1, 5]), "taps the inputs of layers [4, 2, 6], in this order"),
    "layer ids of a deeper target": (nested([1, 15, 28]), "layers [2, 16, 29], but the target has 8 layers"),
    "last layer": (nested([1, 3, 7]), "taps the output of the target's last layer, 7."),
    "four layer ids": (nested([1, 2, 3, 5]), "but the 4 taps [2, 3, 4, 6]"),
    "two conventions": (
        {LAYER_IDS: [1, 3, 5]},
        "lists the layer outputs [1, 3, 5], which are the inputs of layers [2, 4, 6], but",
    ),
    "a norm without weights": ({"fc_norm": True}, "says `fc_norm: true`, but its weights lack what belongs to it"),
    "inside and outside": (
        {"norm_output": False, "eagle_config": {"norm_output": True}},
        "says `norm_output` both true and false",
    ),
    "no fused taps": ({"eagle_config": {"use_aux_hidden_state": False}}, "`use_aux_hidden_state: false`"),
    "parallel": ({"parallel_drafting": True}, "`parallel_drafting`"),
    "quantised": ({"quantization_config": {"quant_method": "fp8"}}, "The draft is quantised"),
    "two layers": ({"num_hidden_layers": 2}, "has 2 decoder layers; a ConFu draft has exactly 1"),
    "another layer": ({"model_type": "gemma3_text"}, "`model_type` 'gemma3_text'; only layers like Llama's"),
    "windowed": ({"layer_types": ["sliding_attention"]}, "is of type ['sliding_attention']"),
    "scaled logits": ({"logit_scale": 0.25}, "scales its logits by 0.25"),
    "two bases": (
        {"rope_parameters": {"rope_theta": 1e6}},
        "`rope_theta` is 1000000.0 in `rope_parameters` and 50000.0 beside it",
    ),
    "RoPE that changes": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "asks for RoPE type 'dynamic'"),
    "RoPE of a part": ({"partial_rotary_factor": 0.5}, "rotates a part of each head only"),
    "another method": ({"speculators_model_type": "dflash"}, "is 'dflash'; only drafts of 'eagle3'"),
    "no layer config": ({"speculators_model_type": "eagle3"}, "`transformer_layer_config` is None"),
    "Gemma by DeepSpec": (
        {"architectures": ["Gemma4Eagle3Model"], "target_layer_ids": [1, 2, 3, 4, 5]},
        "`architectures` is ['Gemma4Eagle3Model']",
    ),
    "DeepSpec for another depth": (
        {"target_layer_ids": [1, 3, 5], "architectures": [], "num_target_layers": 36},
        "made for a target with `num_hidden_layers=36`, but this one has 8",
    ),
}


@pytest.mark.parametrize("changes, sentence", WRONG_CONFIGS.values(), ids=WRONG_CONFIGS.keys())
def test_wrong_configs(tmp_path, target, changes, sentence):
    flat().write(tmp_path)
    config = {name: value for name, value in (flat().config() | changes).items() if changes.get(name, 0) is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert sentence in refusal(tmp_path, target)


def test_what_the_config_says_wrongly_can_be_settled(tmp_path, target):
    flat().write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(flat().config() | nested([5, 3, 1])))
    draft = convert_eagle3(tmp_path, target, target_hidden_state_indices=[2, 4, 6], norm_before_residual=True)
    assert draft.config.target_hidden_state_indices == [2, 4, 6] and draft.config.norm_before_residual


def test_a_flat_norm_output_is_warned_of(tmp_path, target, caplog):
    flat(norm_output=True).write(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert convert_eagle3(tmp_path, target).config.norm_output
    assert "convert again with `norm_output=False`" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert not convert_eagle3(tmp_path, target, norm_output=False).config.norm_output
        assert convert_eagle3(tmp_path, target, norm_output=True).config.norm_output
    assert not caplog.text


# What the target gives


def test_a_configuration_of_the_target_is_enough(tmp_path, target):
    flat().write(tmp_path)
    config = convert_eagle3(tmp_path, target.config).config
    assert (config.eos_token_id, config.pad_token_id, config.bos_token_id) == ([2, 5], 0, 1)
    assert config.max_position_embeddings == 512  # of the target; the source says 64
    assert (config.target_num_hidden_layers, config.target_num_key_value_heads, config.target_head_dim) == (8, 2, 8)


def test_a_target_on_the_disk_is_enough(tmp_path, target):
    table = target.get_input_embeddings().weight.detach()
    flat(embeddings=table.clone()).write(tmp_path / "source")
    for number, size in enumerate(("50GB", "20KB")):
        target.save_pretrained(tmp_path / f"target {number}", max_shard_size=size)
        draft = convert_eagle3(tmp_path / "source", tmp_path / f"target {number}")
        assert not draft.config.has_own_embeddings and draft.embed_tokens is None
    assert len(list((tmp_path / "target 1").glob("*.safetensors"))) > 1


def test_a_table_that_cannot_be_compared_is_kept(tmp_path, target, caplog):
    table = target.get_input_embeddings().weight.detach()
    flat(embeddings=table.clone()).write(tmp_path)
    with caplog.at_level(logging.WARNING):
        draft = convert_eagle3(tmp_path, target.config)
    assert torch.equal(draft.embed_tokens.weight, table)
    assert "it is kept, which costs memory" in caplog.text


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"type": "yarn", "factor": 4.0},
        {"type": "yarn"},
    ],
)
def test_a_longer_target_does_not_change_the_frequencies(tmp_path, target, scaling):
    """The source's own length of 64 sets them, not the 512 that the converted draft takes over."""
    flat().write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(flat().config() | {"rope_scaling": scaling}))
    draft = convert_eagle3(tmp_path, target)
    assert draft.config.max_position_embeddings == 512
    rope = {"rope_type": scaling.get("type") or scaling["rope_type"], "rope_theta": 5e4, "factor": 1.0}
    rope |= {"original_max_position_embeddings": 64} | {k: v for k, v in scaling.items() if k != "type"}
    own = LlamaConfig(hidden_size=32, num_attention_heads=4, max_position_embeddings=64, rope_parameters=rope)
    assert torch.equal(draft.rotary_emb.inv_freq, LlamaRotaryEmbedding(own).inv_freq)


def test_the_dtype_of_the_source_is_kept(tmp_path, target):
    dtype = torch.float16
    flat().write(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights = {name: t.to(dtype) if t.is_floating_point() else t for name, t in weights.items()}
    write_checkpoint(tmp_path, flat().config(), weights)
    draft = convert_eagle3(tmp_path, target)
    assert {parameter.dtype for parameter in draft.parameters()} == {dtype}
    assert torch.equal(draft.fc.weight, weights["fc.weight"])
    assert draft.rotary_emb.inv_freq.dtype == torch.float32
    assert convert_eagle3(tmp_path, target, dtype=torch.bfloat16).dtype == torch.bfloat16
