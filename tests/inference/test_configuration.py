"""What a configuration takes over from a target, what it keeps on disk, and what it refuses."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3Config,
    T5Config,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from transformers_confu import ConFuConfig
from transformers_confu.inference.configuration_confu import default_future_states, default_taps


LLAMA = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 640,
}


def sizes(config: ConFuConfig, *names: str) -> list:
    return [getattr(config, name) for name in names]


def test_sizes_of_a_llama_target():
    config = ConFuConfig.from_target(LlamaConfig(**LLAMA, rms_norm_eps=3e-5, rope_theta=5e5))
    assert config.num_soft_prompts == 16  # the paper's
    assert sizes(config, "vocab_size", "draft_vocab_size", "hidden_size", "target_hidden_size") == [97, 97, 32, 32]
    assert sizes(config, "num_attention_heads", "num_key_value_heads", "head_dim") == [4, 2, 8]
    assert sizes(config, "target_num_hidden_layers", "target_num_key_value_heads", "target_head_dim") == [12, 2, 8]
    assert sizes(config, "num_hidden_layers", "intermediate_size", "max_position_embeddings") == [1, 48, 640]
    assert config.rms_norm_eps == 3e-5 and config.rope_parameters["rope_theta"] == 5e5
    assert config.target_hidden_state_indices == [2, 6, 9]  # EAGLE-3's 2, L // 2, L - 3
    assert config.future_hidden_state_indices == [6, 9, 12]
    assert (config.taps_size, config.future_size) == (96, 96)
    assert not config.has_own_embeddings


EVERY_HEAD = GPTNeoXConfig(**LLAMA | {"num_key_value_heads": None})
NARROW = {"hidden_size": 16, "target_hidden_size": 32, "head_dim": 4, "target_head_dim": 8, "taps_size": 96}


@pytest.mark.parametrize(
    "target, overrides, expected",
    [
        # Heads need not divide the width; without groups every head is cached.
        (Qwen3Config(**LLAMA, head_dim=12), {}, {"head_dim": 12, "target_head_dim": 12, "hidden_size": 32}),
        (EVERY_HEAD, {}, {"num_key_value_heads": 4, "target_num_key_value_heads": 4, "target_head_dim": 8}),
        # A narrow draft owns its embeddings, and one as wide as its target may.
        (LlamaConfig(**LLAMA), {"hidden_size": 16, "head_dim": 4}, NARROW | {"has_own_embeddings": True}),
        (LlamaConfig(**LLAMA), {"has_own_embeddings": True}, {"has_own_embeddings": True, "hidden_size": 32}),
        (LlamaConfig(**LLAMA), {"draft_vocab_size": 40}, {"draft_vocab_size": 40, "vocab_size": 97}),
    ],
)
def test_sizes_of_other_targets_and_drafts(target, overrides, expected):
    config = ConFuConfig.from_target(target, **overrides)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    "num_layers, taps, future_states",
    [
        (1, [1], [1]),
        (2, [1], [1, 2]),
        (3, [1, 2], [1, 2, 3]),
        (4, [1, 2], [1, 2, 4]),
        (5, [2], [2, 5]),
        (6, [2, 3], [2, 3, 6]),
        (7, [2, 3, 4], [3, 4, 7]),
        (30, [2, 15, 27], [15, 27, 30]),
    ],
)
def test_taps_by_depth_of_the_target(num_layers, taps, future_states):
    assert default_taps(num_layers) == taps
    assert default_future_states(num_layers) == future_states
    # Whatever the depth, the defaults are valid.
    config = ConFuConfig.from_target(LlamaConfig(**LLAMA | {"num_hidden_layers": num_layers}))
    assert config.target_hidden_state_indices == taps and config.future_hidden_state_indices == future_states


LINEAR = {"rope_type": "linear", "rope_theta": 3e4, "factor": 2.0}
PLAIN = {"rope_type": "default", "rope_theta": 3e4}
OF_GEMMA3 = Gemma3TextConfig(layer_types=["full_attention"] * 26)


@pytest.mark.parametrize(
    "target, expected",
    [
        (LlamaConfig(**LLAMA, rope_parameters=PLAIN), PLAIN),
        (LlamaConfig(**LLAMA, rope_parameters=LINEAR), LINEAR),
        # The draft cannot follow these, and need not: its positions are its own affair.
        (LlamaConfig(**LLAMA, rope_parameters=LINEAR | {"rope_type": "dynamic"}), PLAIN),
        (EVERY_HEAD, {"rope_type": "default", "rope_theta": 10000}),  # which rotates a quarter of each head
        (OF_GEMMA3, {"rope_type": "default", "rope_theta": 1_000_000}),  # of the layers with full attention
    ],
)
def test_rope_of_the_target(target, expected):
    assert ConFuConfig.from_target(target).rope_parameters == expected


def test_a_configuration_survives_the_disk(tmp_path):
    config = ConFuConfig.from_target(
        LlamaConfig(**LLAMA, bos_token_id=None, eos_token_id=[2, 5], pad_token_id=2),
        draft_vocab_size=40,
        target_hidden_state_indices=[1, 5, 11],
        future_hidden_state_indices=[12],
        num_soft_prompts=0,
        num_contemplate_experts=1,
        num_contemplate_experts_per_token=1,
        num_future_experts=5,
        num_future_experts_per_token=3,
        use_future_residual=False,
    )
    assert sizes(config, "bos_token_id", "eos_token_id", "pad_token_id") == [None, [2, 5], 2]  # verbatim
    config.save_pretrained(tmp_path)
    # `auto_map` only exists on disk, as in every checkpoint with code of its own.
    loaded = ConFuConfig.from_pretrained(tmp_path).to_dict()
    assert loaded.pop("auto_map") == {"AutoConfig": "configuration_confu.ConFuConfig"}
    expected = config.to_dict()
    expected.pop("auto_map", None)
    assert loaded == expected
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "confu"


def test_the_targets_configuration_is_not_written_to():
    target = LlamaConfig(**LLAMA, eos_token_id=[2, 5], rope_theta=5e5)
    before = json.dumps(target.to_dict(), sort_keys=True)
    config = ConFuConfig.from_target(target, hidden_size=16)
    config.rope_parameters["rope_theta"] = 1.0
    config.eos_token_id.append(9)
    config.target_hidden_state_indices.append(12)
    assert json.dumps(target.to_dict(), sort_keys=True) == before


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
OF_AT_LEAST_ONE = [
    *("vocab_size", "draft_vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "target_hidden_size", "target_num_hidden_layers"),
    *("target_num_key_value_heads", "target_head_dim", "num_contemplate_experts", "num_contemplate_experts_per_token"),
    *("num_future_experts", "num_future_experts_per_token"),
]
INVALID = [
    (
        {"num_contemplate_experts": 2, "num_contemplate_experts_per_token": 3},
        "`num_contemplate_experts_per_token` (3) exceeds `num_contemplate_experts` (2).",
    ),
    ({"target_hidden_state_indices": [2, 13]}, "a target of 12 layers has hidden states 0"),
    ({"target_hidden_state_indices": [-1, 2]}, "a target of 12 layers has hidden states 0"),
    ({"target_hidden_state_indices": [6, 2]}, "must be a non-empty list of rising, distinct indices."),
    ({"target_hidden_state_indices": [2, 2]}, "must be a non-empty list of rising, distinct indices."),
    ({"future_hidden_state_indices": []}, "`future_hidden_state_indices` is []; it must be a non-empty list"),
    ({"draft_vocab_size": 98}, "`draft_vocab_size` (98) exceeds `vocab_size` (97)"),
    (
        {"num_attention_heads": 4, "num_key_value_heads": 3},
        "`num_attention_heads` (4) is not a multiple of `num_key_value_heads` (3).",
    ),
    ({"head_dim": 7}, "`head_dim` is 7; rotary embeddings need an even number."),
    ({"num_hidden_layers": 2}, "an EAGLE-3 draft has exactly 1 decoder layer."),
    ({"rope_parameters": DYNAMIC}, "`rope_parameters` asks for RoPE type 'dynamic'; a draft can use"),
    (
        {"hidden_size": 16, "has_own_embeddings": False},
        "the draft is 16 wide and the target 32: only a draft as wide as its target can read the target's embeddings.",
    ),
    ({"fc_norm": True, "norm_before_fc": True}, "either each by itself or together."),
    ({"num_soft_prompts": -1}, "`num_soft_prompts` is -1; it must be 0 (none) or more."),
    ({"attention_window": 0}, "`attention_window` is 0; it must be at least 1, or None for all."),
    *(({name: 0}, f"`{name}` is 0; it must be at least 1.") for name in OF_AT_LEAST_ONE),
]


@pytest.mark.parametrize("changes, sentence", INVALID)
def test_sizes_that_cannot_belong_together_are_refused(changes, sentence):
    with pytest.raises(StrictDataclassError) as error:
        ConFuConfig.from_target(LlamaConfig(**LLAMA), **changes)
    assert sentence in str(error.value)


def test_a_target_without_the_sizes_of_a_decoder_is_refused():
    class Featureless(PreTrainedConfig):
        model_type = "featureless"

    with pytest.raises(ValueError, match="Featureless has no `vocab_size`, `hidden_size`, `num_hidden_layers`"):
        ConFuConfig.from_target(Featureless())


def test_an_encoder_decoder_target_is_refused():
    with pytest.raises(ValueError, match="T5Config is of an encoder-decoder model; ConFu drafts for decoder-only"):
        ConFuConfig.from_target(T5Config(d_model=32, num_heads=4, vocab_size=97))


# Every family


def test_every_causal_model_gives_a_configuration_or_one_sentence():
    """Whatever its configuration calls things, and whether or not it can be served."""
    given = 0
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            target_config = CONFIG_MAPPING[model_type]()
        except Exception:  # noqa: S112 - some cannot be made without arguments
            continue
        try:
            config = ConFuConfig.from_target(target_config)
        except ValueError as error:
            assert "ConFu" in str(error)
        else:
            given += 1
            rope = config.rope_parameters
            assert not any(isinstance(value, dict) for value in rope.values()), (model_type, rope)
    assert given > 150


def test_a_configuration_with_dropout_of_old_is_read():
    config = ConFuConfig.from_dict(ConFuConfig().to_dict() | {"attention_dropout": 0.1})
    assert "attention_dropout" not in config.to_dict()
