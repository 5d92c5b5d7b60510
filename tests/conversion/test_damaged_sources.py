"""What is refused on the way in, each with a sentence that names the cause, and what is warned of."""

import json
import logging
import os

import pytest
import torch
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
    "files, damaged", [("shards", "model-00002-of-00002.safetensors"), ("bin", "pytorch_model.bin")]
)
def test_a_truncated_file(tmp_path, target, files, damaged):
    path = flat().write(tmp_path, files) / damaged
    content = path.read_bytes()
    for kept in (0.99, 0.0):
        path.write_bytes(content[: int(kept * len(content))])
        message = refusal(tmp_path, target)
        assert damaged in message and "damaged" in message


def test_a_missing_shard(tmp_path, target):
    flat().write(tmp_path, "shards")
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    sentence = "model.safetensors.index.json names the file model-00001-of-00002.safetensors, which is not in"
    assert sentence in refusal(tmp_path, target)


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
    """Makes a folder when it is unpickled."""

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
        return str(tmp_path / repository)

    monkeypatch.setattr(checkpoints, "snapshot_download", snapshot_download)
    for files in ("shards", "bin"):
        flat().write(tmp_path / "org" / files, files)
        draft = convert_eagle3(f"org/{files}", target, revision="v1")
        assert draft.config.target_hidden_state_indices == [2, 4, 6]
    assert asked == [
        ("org/shards", "v1", ["*.json", "*.safetensors"]),
        ("org/bin", "v1", ["*.json", "*.safetensors"]),
        ("org/bin", "v1", ["*.json", "pytorch_model*.bin"]),
    ]


# Weights


def with_weights(folder, changes: dict[str, torch.Tensor | None], source: Source | None = None, **config):
    """Write a source with other weights (`None`: without them) and another config."""
    source = source or flat()
    weights = {name.replace("layers.0.", "midlayer."): tensor for name, tensor in source.weights().items()} | changes
    weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
    write_checkpoint(folder, source.config() | config, weights)
    return folder


D2T, T2D = (flat().weights()[name] for name in ("d2t", "t2d"))
IDS = D2T + torch.arange(40)
zeros = torch.zeros
WRONG_WEIGHTS = [
    (
        {"midlayer.mlp.up_proj.weight": None, "norm.weight": None},
        'Missing key(s) in state_dict: "layers.0.mlp.up_proj.weight", "norm.weight"',
    ),
    ({"midlayer.hidden_norm.weight": None, "lm_head.weight": None}, "It looks like a draft of EAGLE-1 or 2"),
    ({"mask_hidden": zeros(1, 96), "fc.bias": zeros(32)}, 'Unexpected key(s) in state_dict: "mask_hidden", "fc.bias"'),
    ({"layers.0.hidden_norm.weight": zeros(32)}, "holds layers.0.hidden_norm.weight twice, under two names."),
    ({"midlayer.self_attn.q_proj.weight": zeros(32, 32)}, "size mismatch for layers.0.self_attn.q_proj.weight"),
    ({"fc.weight": zeros(32, 64)}, "`fc.weight` reads 64 numbers, but the 3 taps [2, 4, 6] of a target of width 32"),
    ({"lm_head.weight": zeros(40, 32, dtype=torch.int8)}, "The source's lm_head.weight are integers"),
    ({"midlayer.self_attn.q_proj.bias": zeros(32)}, "`attention_bias: false`, but its weights include what"),
    ({"d2t": None}, "predicts 40 of 97 tokens, but has no `d2t`"),
    ({"d2t": IDS}, "`d2t` holds token ids, expected offsets"),
    ({"d2t": IDS.flip(0) - torch.arange(40)}, "`d2t` and `t2d` name different tokens"),
    ({"d2t": D2T + 97, "t2d": None}, "`d2t` and `t2d` name different tokens: `d2t` leads to"),
    ({"d2t": D2T[:-1].clone()}, "`d2t` has the shape (39,), expected (40,)"),
    ({"d2t": D2T.float()}, "`d2t` holds torch.float32"),
    ({"t2d": T2D[:-1].clone()}, "`t2d` has the shape (96,), expected (97,)"),
]


@pytest.mark.parametrize("changes, sentence", WRONG_WEIGHTS)
def test_wrong_weights(tmp_path, target, changes, sentence):
    assert sentence in refusal(with_weights(tmp_path, changes), target)


def test_the_first_names_of_eagle_3_1_are_understood(tmp_path, target):
    source = flat(fc_norm=True)
    norms = [source.weights()[f"fc_norm.{i}.weight"] for i in range(3)]
    renamed = {f"aux_norm_{name}.weight": norm for name, norm in zip(("low", "mid", "high"), norms, strict=True)}
    gone = {f"fc_norm.{i}.weight": None for i in range(3)}
    draft = convert_eagle3(with_weights(tmp_path, renamed | gone, source, fc_norm=None, use_aux_norm=True), target)
    assert draft.config.fc_norm and torch.equal(draft.fc_norm[2].weight, norms[2])


def test_a_map_without_its_inverse_or_its_size_is_completed(tmp_path, target):
    draft = convert_eagle3(with_weights(tmp_path, {"t2d": None}, draft_vocab_size=None), target)
    assert draft.config.draft_vocab_size == 40 and torch.equal(draft.d2t, D2T) and torch.equal(draft.t2d, T2D)


# Config


LAYER_IDS = "eagle_aux_hidden_state_layer_ids"


def nested(ids: list[int]) -> dict:
    return {"eagle_config": {LAYER_IDS: ids}}


WRONG_CONFIGS = [
    ({"hidden_size": None, "intermediate_size": None}, "has no `hidden_size`, `intermediate_size`."),
    ({"draft_vocab_size": 50}, "`d2t` has the shape (40,), expected (50,)"),
    ({"vocab_size": 100}, "made for a target with `vocab_size=100`, but this one has 97"),
    (nested([3, 1, 5]), "taps the inputs of layers [4, 2, 6], in this order"),
    (nested([1, 15, 28]), "layers [2, 16, 29], but the target has 8 layers"),
    (nested([1, 3, 7]), "taps the output of the target's last layer, 7."),
    (nested([1, 2, 3, 5]), "but the 4 taps [2, 3, 4, 6]"),
    ({LAYER_IDS: [1, 3, 5]}, "lists the layer outputs [1, 3, 5], which are the inputs of layers [2, 4, 6], but"),
    ({"fc_norm": True}, "says `fc_norm: true`, but its weights lack what belongs to it"),
    ({"norm_output": False, "eagle_config": {"norm_output": True}}, "says `norm_output` both true and false"),
    ({"eagle_config": {"use_aux_hidden_state": False}}, "`use_aux_hidden_state: false`"),
    ({"parallel_drafting": True}, "`parallel_drafting`"),
    ({"quantization_config": {"quant_method": "fp8"}}, "The draft is quantised"),
    ({"num_hidden_layers": 2}, "has 2 decoder layers; a ConFu draft has exactly 1"),
    ({"model_type": "gemma3_text"}, "`model_type` 'gemma3_text'; only layers like Llama's"),
    ({"layer_types": ["sliding_attention"]}, "is of type ['sliding_attention']"),
    ({"logit_scale": 0.25}, "scales its logits by 0.25"),
    ({"rope_parameters": {"rope_theta": 1e6}}, "`rope_theta` is 1000000.0 in `rope_parameters` and 50000.0 beside it"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "asks for RoPE type 'dynamic'"),
    ({"partial_rotary_factor": 0.5}, "rotates a part of each head only"),
    ({"speculators_model_type": "dflash"}, "is 'dflash'; only drafts of 'eagle3'"),
    ({"speculators_model_type": "eagle3"}, "`transformer_layer_config` is None"),
    (
        {"architectures": ["Gemma4Eagle3Model"], "target_layer_ids": [1, 2, 3, 4, 5]},
        "`architectures` is ['Gemma4Eagle3Model']",
    ),
    (
        {"target_layer_ids": [1, 3, 5], "architectures": [], "num_target_layers": 36},
        "made for a target with `num_hidden_layers=36`, but this one has 8",
    ),
]


@pytest.mark.parametrize("changes, sentence", WRONG_CONFIGS)
def test_wrong_configs(tmp_path, target, changes, sentence):
    flat().write(tmp_path)
    config = {name: value for name, value in (flat().config() | changes).items() if changes.get(name, 0) is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert sentence in refusal(tmp_path, target)


def test_what_the_config_says_wrongly_can_be_settled(tmp_path, target):
    with_weights(tmp_path, {}, **nested([5, 3, 1]))
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


def test_a_copy_of_the_targets_table_is_left_out_where_the_two_can_be_compared(tmp_path, target, caplog):
    table = target.get_input_embeddings().weight.detach()
    flat(embeddings=table.clone()).write(tmp_path / "source")
    with caplog.at_level(logging.WARNING):
        draft = convert_eagle3(tmp_path / "source", target.config)
    assert torch.equal(draft.embed_tokens.weight, table)
    assert "it is kept, which costs memory" in caplog.text
    for number, size in enumerate(("50GB", "20KB")):
        target.save_pretrained(tmp_path / f"target {number}", max_shard_size=size)
        draft = convert_eagle3(tmp_path / "source", tmp_path / f"target {number}")
        assert not draft.config.has_own_embeddings and draft.embed_tokens is None
    assert len(list((tmp_path / "target 1").glob("*.safetensors"))) > 1


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("scaling", [LLAMA3, {"type": "yarn", "factor": 4.0}, {"type": "yarn"}])
def test_a_longer_target_does_not_change_the_frequencies(tmp_path, target, scaling):
    """The source's own length of 64 sets them, not the 512 that the converted draft takes over."""
    draft = convert_eagle3(with_weights(tmp_path, {}, rope_scaling=scaling), target)
    assert draft.config.max_position_embeddings == 512
    rope = {"rope_type": scaling.get("type") or scaling["rope_type"], "rope_theta": 5e4, "factor": 1.0}
    rope |= {"original_max_position_embeddings": 64} | {k: v for k, v in scaling.items() if k != "type"}
    own = LlamaConfig(hidden_size=32, num_attention_heads=4, max_position_embeddings=64, rope_parameters=rope)
    assert torch.equal(draft.rotary_emb.inv_freq, LlamaRotaryEmbedding(own).inv_freq)


def test_the_dtype_of_the_source_is_kept(tmp_path, target):
    halves = {name: tensor.half() for name, tensor in flat().weights().items() if tensor.is_floating_point()}
    halves = {name.replace("layers.0.", "midlayer."): tensor for name, tensor in halves.items()}
    draft = convert_eagle3(with_weights(tmp_path, halves), target)
    assert {parameter.dtype for parameter in draft.parameters()} == {torch.float16}
    assert torch.equal(draft.fc.weight, halves["fc.weight"])
    assert draft.rotary_emb.inv_freq.dtype == torch.float32
    assert convert_eagle3(tmp_path, target, dtype=torch.bfloat16).dtype == torch.bfloat16
