"""Which targets a draft serves: architectures, precisions, and the ways in which a model may be loaded or wrapped."""

import copy

import peft
import pytest
import torch
import transformers
from accelerate import cpu_offload, disk_offload, dispatch_model
from packaging import version
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    DynamicCache,
    PreTrainedModel,
)
from transformers.integrations.peft import MIN_PEFT_VERSION

from exactness import assert_close, assert_identical, compare
from helpers import SIZES, make_family, make_tiny_draft, make_tiny_target, rotate
from transformers_confu import ConFuDraftModel, confu_generation_config
from transformers_confu.inference.cached_rows import filled_layers
from transformers_confu.inference.checks import check_cache, check_target
from transformers_confu.inference.draft_tree import DraftTree
from transformers_confu.inference.growing_cache import let_grow
from transformers_confu.inference.recurrent_layers import recurrent_layers
from transformers_confu.inference.soft_prompts import KeyRotation
from transformers_confu.inference.target import TargetRunner


PROMPT = torch.tensor([[3, 4, 5, 2, 7, 6, 8]])
KNOBS = {"tree_size": 12, "depth": 5, "branching": 3, "contemplation": 5}

# So few tokens that even a random draft is often right.
SMALL = {"vocab_size": 13, "max_position_embeddings": 128, "pad_token_id": 0}
FULL_ATTENTION = {"layer_types": ["full_attention"] * 5}
MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]}
SHORT, LONGER = {"sliding_window": 4}, {"sliding_window": 13}  # crossed by the prompt; by the text
LAST_FULL = {"layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"]}

# Without what is looked up for each token in every layer.
GEMMA4 = LAST_FULL | {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "per_layer_config": {}}
LARGER_HEADS = {layer: {"head_dim": 16, "num_key_value_heads": 1} for layer in (1, 3, 4)}
# With it, and with layers at the end that read the keys of others.
PER_LAYER = {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 13, "num_kv_shared_layers": 2}
GEMMA3N = MIXED | PER_LAYER | {"laurel_rank": 4, "altup_num_inputs": 3}
GEMMA3N |= {"activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0, 0.0]}
LARGER_HEADS_TOO = {"use_double_wide_mlp": True, "per_layer_config": {layer: {"head_dim": 16} for layer in (1, 3, 4)}}
# Latent attention, with experts in all layers but the first two.
LATENT = {"num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 12, "v_head_dim": 6, "head_dim": 4}
LATENT |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2}
LATENT |= {"n_group": 1, "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 2}

# Recurrent layers beside attention: gated delta nets, Mamba 2, short convolutions.
HYBRID = {"layer_types": ["linear_attention", "full_attention", *["linear_attention"] * 2, "full_attention"]}
DELTA_NET = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
DELTA_NET |= HYBRID | {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_chunk_size": 4}
NEMOTRON_H = {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 4}
NEMOTRON_H |= {"layers_block_type": ["linear_attention", "mlp", "full_attention"] + HYBRID["layer_types"][3:]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

ARCHITECTURES = {
    # Named in the documentation.
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Mistral": {"sliding_window": None},
    # Other norms and their places, biases, activations, scaled embeddings, residuals and logits.
    "Olmo2": {},
    "Gemma": {},
    "Gemma2": FULL_ATTENTION,
    "Gemma3Text": FULL_ATTENTION,
    "Phi3": {"original_max_position_embeddings": 128},
    "Granite": {},
    "Cohere": {},
    "Starcoder2": {"sliding_window": None},
    "SmolLM3": {},
    "Nemotron": {},
    # Rotation of a part of each head; of pairs; none.
    "GPTNeoX": {},
    "Glm4": {},
    "GPTJ": {"rotary_dim": 8},
    "GPT2": {},
    "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "GPTBigCode": {"num_key_value_heads": 1},
    "Falcon": {"num_kv_heads": 2, "new_decoder_architecture": True},
    "Falcon, one head of keys": {"multi_query": True, "new_decoder_architecture": False},
    # Differential attention; attention sinks.
    "DiffLlama": {},
    "GptOss": FULL_ATTENTION | {"num_local_experts": 4},
    # Mixtures of experts.
    "Mixtral": {"num_local_experts": 4, "sliding_window": None, "output_router_logits": True},
    "Qwen3Moe": EXPERTS,
    # Sliding windows in some layers, or in all.
    "Gemma2, windows": MIXED | SHORT,
    "Gemma3Text, windows": MIXED | LONGER,
    "Gemma4Text, windows": GEMMA4 | SHORT,
    "Gemma4Text, windows and larger heads": GEMMA4 | LONGER | {"per_layer_config": LARGER_HEADS},
    # Token ids are looked up in every layer, and the last two layers have no keys of their own.
    "Gemma3nText, full": GEMMA3N | FULL_ATTENTION,
    "Gemma3nText, windows": GEMMA3N | SHORT,
    "Gemma4Text, ids in every layer": GEMMA4 | PER_LAYER | SHORT,
    "Gemma4Text, ids in every layer and larger heads": GEMMA4 | PER_LAYER | LONGER | LARGER_HEADS_TOO,
    "Qwen2, windows": MIXED | LONGER | {"use_sliding_window": True},
    "Qwen3, windows": MIXED | SHORT | {"use_sliding_window": True},
    "Mistral, windows": SHORT,
    "Ministral, windows": MIXED | LONGER,
    "Ministral3, windows": LONGER,
    "Olmo3, windows": MIXED | SHORT,
    "GptOss, windows": MIXED | SHORT | {"num_local_experts": 4},
    "Cohere2, windows": MIXED | SHORT,
    "Exaone4, windows": MIXED | LONGER | {"sliding_window_pattern": None},
    "Phi3, windows": SHORT | {"original_max_position_embeddings": 128},
    "Starcoder2, windows": LONGER,
    "Mixtral, windows": SHORT | {"num_local_experts": 4},
    "DeepseekV2, dense": LATENT | {"first_k_dense_replace": 5},
    "DeepseekV3, dense": LATENT | {"first_k_dense_replace": 5},
    "DeepseekV2": LATENT,
    "DeepseekV3": LATENT,
    "Glm4MoeLite": LATENT | {"mlp_layer_types": ["dense", "dense", "sparse", "sparse", "sparse"]},
    # Recurrent layers; the last kind with both attention and a state in every layer.
    "Qwen3_5Text": DELTA_NET,
    "Qwen3_5MoeText": DELTA_NET | EXPERTS,
    "Qwen3Next": DELTA_NET | EXPERTS | {"shared_expert_intermediate_size": 16},
    "OlmoHybrid": DELTA_NET | {"linear_num_key_heads": 4},
    "GraniteMoeHybrid": MAMBA | HYBRID | {"num_local_experts": 0, "shared_intermediate_size": 64},
    "Bamba": MAMBA | {"attn_layer_indices": [1, 4]},
    "NemotronH": NEMOTRON_H,
    "Lfm2": {"layer_types": ["conv", "full_attention", "conv", "conv", "full_attention"]},
    "FalconH1": MAMBA | {"mamba_d_ssm": 64, "embedding_multiplier": 1.5},
}
EAGER_ONLY = {"GPTJ", "GptOss", "Gemma2", "Gemma2, windows", "GptOss, windows"}
# The experts' grouped matrix product has none.
WITHOUT_FP64 = {"GptOss", "GptOss, windows", "Mixtral", "Mixtral, windows", "Qwen3Moe"}
WITHOUT_FP64 |= {"DeepseekV2", "DeepseekV3", "Glm4MoeLite", "Qwen3_5MoeText", "Qwen3Next"}
ROTATES_IN_FP32 = {"DeepseekV2, dense"}
# Their keys, values or layers differ in size.
WITHOUT_SOFT_PROMPTS = {"Gemma4Text, windows and larger heads", "DeepseekV2", "DeepseekV3", "Glm4MoeLite"}
WITHOUT_SOFT_PROMPTS |= {"Gemma4Text, ids in every layer and larger heads"}
WITHOUT_SOFT_PROMPTS |= {"DeepseekV2, dense", "DeepseekV3, dense"}

architectures = pytest.mark.parametrize(
    "name, implementation",
    [
        (name, implementation)
        for name in ARCHITECTURES
        for implementation in ("sdpa", "eager")
        if implementation == "eager" or name not in EAGER_ONLY
    ],
)


def make_target(name: str, implementation: str = "sdpa", **changes) -> PreTrainedModel:
    return make_family(
        name.split(",")[0],
        attn_implementation=implementation,
        dtype=torch.float32 if name in WITHOUT_FP64 else torch.float64,
        **SMALL | ARCHITECTURES[name] | changes,
    )


def make_draft(name: str, target: PreTrainedModel) -> ConFuDraftModel:
    return make_tiny_draft(target, num_soft_prompts=0 if name in WITHOUT_SOFT_PROMPTS else 4)


def assert_same_text(target, draft: ConFuDraftModel, max_new_tokens: int = 24) -> None:
    """Greedy and sampled, with trees that are often right and at random places, so that cache rows have to move."""
    for do_sample in (False, True):
        comparison = compare(
            target,
            draft,
            PROMPT,
            {"do_sample": do_sample, "max_new_tokens": max_new_tokens},
            KNOBS,
            record=False,
            oracle=True,
        )
        assert comparison.first_difference() is None
        assert torch.equal(comparison.plain_state, comparison.assisted_state)
        assert comparison.statistics.tau > 1.2
        assert any(path != list(range(len(path))) for path in comparison.oracle.paths)
    text = comparison.plain.sequences[0, PROMPT.shape[1] :]
    assert len(text.unique()) > 3  # on a text that repeats one token, wrong decoding would look right


def assert_same_chat(target, draft: ConFuDraftModel, **more) -> None:
    """Three turns on one cache, the second by plain `generate`."""
    text, cache = PROMPT, None
    for turn, assistant in enumerate([draft, None, draft]):
        # The mask, as else Transformers takes tokens for padding that the text happens to have.
        options = {"attention_mask": torch.ones_like(text), "do_sample": False, "max_new_tokens": 12} | more
        output = target.generate(text, cache=cache, assistant_model=assistant, return_dict_in_generate=True, **options)
        assert torch.equal(output.sequences, target.generate(text, **options))
        text, cache = torch.cat([output.sequences, PROMPT[:, turn : turn + 3]], dim=1), output.cache


# Architectures


@architectures
def test_decoding_is_exact(name, implementation):
    target = make_target(name, implementation)
    assert_same_text(target, make_draft(name, target))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_chats_and_chunked_prefill_are_exact(name):
    target = make_target(name, "eager")
    draft = make_draft(name, target)
    assert_same_chat(target, draft)
    assert_same_chat(target, draft, prefill_chunk_size=3)


TREE = DraftTree.from_parents(
    torch.tensor([[9, 3, 4, 5, 6, 7, 7]]), torch.tensor([[0, 0, 0, 1, 2, 3, 0]]), torch.zeros(1, 7)
)
CONTEMPLATED = torch.tensor([[0, 2, 3, 5, 6]])


def path_to(node: int) -> list[int]:
    tokens = []
    while node:
        tokens.insert(0, int(TREE.tokens[0, node]))
        node = int(TREE.parents[0, node])
    return [int(TREE.tokens[0, 0]), *tokens]


def prefill(target, runner: TargetRunner, ids: torch.LongTensor):
    """A cache that holds `ids`, and the taps of the last of them."""
    cache = DynamicCache(config=target.config)
    positions = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        outputs = target(ids, cache=cache, position_ids=positions, output_hidden_states=runner.recorded)
    return cache, runner.taps(outputs.hidden_states)[:, -1]


def forward_over(target, ids: torch.LongTensor):
    """Outputs of the target over a text; token by token behind the prompt if it has states, as plain decoding does."""
    cache = DynamicCache(config=target.config)
    if any(cache.is_sliding):
        cache = DynamicCache()  # which holds all rows, whatever the windows
    options = {"cache": cache, "output_hidden_states": True}
    if not recurrent_layers(cache):
        return target(ids, **options)
    outputs = target(ids[:, : PROMPT.shape[1]], **options)
    for column in range(PROMPT.shape[1], ids.shape[1]):
        outputs = target(ids[:, column : column + 1], position_ids=torch.tensor([[column]]), **options)
    return outputs


def future_by_prefix(target, draft: ConFuDraftModel, ids: torch.LongTensor, routed_by: torch.Tensor) -> torch.Tensor:
    """f behind `ids` without any code of the runner: the soft prompts are ordinary cached rows before them."""
    cache = forward_over(target, ids).cache
    for index, layer in enumerate(cache.layers):
        if draft.config.num_soft_prompts and layer in filled_layers(cache):
            slots = draft.future_channel.soft_prompts[index].to(layer.keys)
            layer.keys = torch.cat([slots[:1], layer.keys], 2)
            layer.values = torch.cat([slots[1:], layer.values], 2)
    embedding = draft.future_channel.contemplate_token(routed_by)[:, None]
    config = target.config.get_text_config()
    layer_inputs = {}
    if size := getattr(config, "hidden_size_per_layer_input", None):
        layer_inputs = {"per_layer_inputs": embedding.new_zeros(1, 1, config.num_hidden_layers, size)}
    length, num_slots = ids.shape[1], draft.config.num_soft_prompts
    all_visible = torch.zeros(1, 1, 1, num_slots + length + 1, dtype=embedding.dtype)
    within_window = all_visible.clone()
    if (window := getattr(config, "sliding_window", None)) is not None:
        within_window[..., num_slots : num_slots + max(length + 1 - window, 0)] = -torch.inf
    of_kinds = {"full_attention": all_visible, "sliding_attention": within_window}
    layer_types = set(getattr(config, "layer_types", None) or ["sliding_attention"]) & of_kinds.keys()
    layer_types = layer_types or {"full_attention"}
    hidden_states = target(
        inputs_embeds=embedding,
        **layer_inputs,
        cache=cache,
        position_ids=torch.tensor([[length]]),
        attention_mask=of_kinds if len(layer_types) > 1 else of_kinds[layer_types.pop()],
        output_hidden_states=True,
    ).hidden_states
    return last_of(hidden_states, draft.config.future_hidden_state_indices)


def last_of(hidden_states: tuple, indices: list[int]) -> torch.Tensor:
    """Some states of the last row; of several streams, as Gemma 3n has them, the first."""
    states = [hidden_states[index] for index in indices]
    return torch.cat([state[0, 0, -1] if state.dim() == 4 else state[0, -1] for state in states])


@architectures
@torch.no_grad()
def test_a_verified_tree_is_a_forward_over_each_path(name, implementation):
    """Logits, taps and f of every node, against fresh forwards; without contemplate rows the same logits."""
    target = make_target(name, implementation)
    draft = make_draft(name, target)
    runner = TargetRunner(target, draft.config, draft.future_channel)
    # Eager attention and most norms compute in fp32 even in an fp64 model.
    is_fp64 = target.dtype == torch.float64 and implementation == "sdpa" and name not in ROTATES_IN_FP32
    tolerance = 1e-12 if is_fp64 else 1e-4

    def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
        return (actual - expected).abs().max() <= tolerance * expected.abs().max()

    cache, routed_by = prefill(target, runner, PROMPT)
    recurrent = recurrent_layers(cache)
    check_target(target, draft.config)
    check_cache(cache, draft.config, target)
    arguments = (torch.tensor([7]), torch.ones(1, 7, dtype=torch.bool))
    caches = [copy.deepcopy(cache), cache]
    for cache in caches:
        let_grow(cache)
    verified = runner.verify(TREE, CONTEMPLATED, routed_by, caches[0], *arguments)
    alone = runner.verify(TREE, None, routed_by, caches[1], *arguments)
    assert verified.outputs.logits.shape[1] == alone.outputs.logits.shape[1] == TREE.size
    assert alone.futures is None and verified.taps.shape == (1, TREE.size, draft.config.taps_size)
    assert close(verified.outputs.logits, alone.outputs.logits)

    for node in range(TREE.size):
        ids = torch.cat([PROMPT, torch.tensor([path_to(node)])], dim=1)
        fresh = forward_over(target, ids)
        assert close(verified.outputs.logits[0, node], fresh.logits[0, -1])
        taps = last_of(fresh.hidden_states, draft.config.target_hidden_state_indices)
        assert close(verified.taps[0, node], taps)
        if node in CONTEMPLATED[0]:
            future = verified.futures[0, CONTEMPLATED[0].tolist().index(node)]
            assert close(future, future_by_prefix(target, draft, ids, routed_by))
            # And as prefill computes it, behind a cache that really holds the path.
            path_cache = forward_over(target, ids).cache if recurrent else prefill(target, runner, ids)[0]
            length = ids.shape[1]
            visible = torch.ones(1, 1, length, dtype=torch.bool)
            place = torch.tensor([[length]])
            contemplated = runner.contemplate(path_cache, routed_by[:, None], place, place, visible)
            assert close(future, contemplated[0, 0])
            assert path_cache.get_seq_length() == length  # left as it was


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if ARCHITECTURES[name].get("num_kv_shared_layers")])
def test_attentions_of_layers_that_read_the_keys_of_others(name):
    target = make_target(name, "eager")
    options = {"do_sample": False, "max_new_tokens": 16, "output_attentions": True}
    comparison = compare(target, make_draft(name, target), PROMPT, options, KNOBS, oracle=True)
    assert_close(comparison.plain.attentions, comparison.assisted.attentions, 1e-5)
    # And in a cache of the user's that has no place for these layers.
    draft, cache = make_draft(name, target), DynamicCache()
    options = {"do_sample": False, "max_new_tokens": 16}
    text = target.generate(PROMPT, assistant_model=draft, cache=cache, **options)
    assert torch.equal(text, target.generate(PROMPT, **options))
    assert len(cache.layers) == 3


# Rotated soft prompts


# Positions of another kind, or not in every layer.
NOT_ROTATED = {"GPT2", "OPT", "GPTBigCode", "GPTJ", "SmolLM3", "Cohere2, windows", "Exaone4, windows"}
NOT_ROTATED |= {"GraniteMoeHybrid", "NemotronH"}


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in WITHOUT_SOFT_PROMPTS])
@torch.no_grad()
def test_keys_rotate_as_the_target_rotates_its_own(name):
    """A token that sees only itself has the same states at every position, but for the rotation of its keys."""
    target = make_target(name, "eager")
    if name in NOT_ROTATED:
        draft = make_tiny_draft(target, rotate_soft_prompts=True)
        with pytest.raises(ValueError, match=rf"RoPE .* but {type(target).__name__} has none that serves every layer"):
            check_target(target, draft.config)
        return

    def keys_at(positions: list[int]) -> torch.Tensor:
        cache = DynamicCache(config=target.config)
        count = len(positions)
        target(torch.full((count, 1), 5), position_ids=torch.tensor(positions)[:, None], cache=cache)
        return torch.stack([layer.keys for layer in filled_layers(cache)])  # (layers, positions, kv_heads, 1, hd)

    positions = [0, 1, 7, 100]
    keys = keys_at(positions)
    assert (keys[:, 0] - keys[:, -1]).abs().amax((1, 2, 3)).min() > 1e-2
    rotated = KeyRotation(target)(keys[:, 0], torch.tensor([positions[:2], positions[2:]]))
    # Sets of slots that follow one another in a row of the batch.
    expected = torch.stack([keys[:, :2], keys[:, 2:]], dim=1).squeeze(-2).transpose(2, 3)
    torch.testing.assert_close(rotated, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_scale_of_yarn_is_not_applied_twice():
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 32}
    target = make_target("Llama", rope_parameters=rope)
    keys = torch.randn(5, 2, 3, 8, dtype=torch.float64)
    assert target.model.rotary_emb.attention_scaling > 1.1
    rotation = KeyRotation(target)
    torch.testing.assert_close(rotation(keys, torch.tensor([[0]]))[:, 0], keys)
    rotated = rotation(keys, torch.tensor([[9]]))[:, 0]
    torch.testing.assert_close(rotated.norm(dim=-1), keys.norm(dim=-1), rtol=1e-6, atol=0)
    assert (rotated - keys).abs().max() > 0.1


@torch.no_grad()
def test_rotated_soft_prompts_stand_at_the_root():
    """f of every node against a forward whose slots are cached rows at the root's position; and the text is exact."""
    target = make_target("Llama")
    draft = make_tiny_draft(target, rotate_soft_prompts=True)
    runner = TargetRunner(target, draft.config, draft.future_channel)
    root = PROMPT.shape[1]
    cache, routed_by = prefill(target, runner, PROMPT)
    visible = torch.ones(1, root, dtype=torch.bool)
    futures = runner.verify(TREE, CONTEMPLATED, routed_by, cache, torch.tensor([root]), visible).futures[0]
    keys = draft.future_channel.soft_prompts[:, 0]
    assert (rotate(keys, root) - keys).abs().max() > 0.1
    keys.copy_(rotate(keys, root))
    for node, future in zip(CONTEMPLATED[0].tolist(), futures, strict=True):
        ids = torch.cat([PROMPT, torch.tensor([path_to(node)])], dim=1)
        torch.testing.assert_close(future, future_by_prefix(target, draft, ids, routed_by), rtol=1e-6, atol=1e-6)
    assert_same_text(target, draft)


def with_images(name: str, text: dict, vision: dict, **more) -> PreTrainedModel:
    """A model of text and images; its text has the sizes of `SIZES`, where `text` says nothing else."""
    text_class = type(getattr(transformers, f"{name}Config")().text_config)
    known = text_class().to_dict().keys()
    text = {key: value for key, value in (SIZES | SMALL | text).items() if key in known}
    return make_family(name, AutoModelForImageTextToText, text_config=text_class(**text), vision_config=vision, **more)


VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


WINDOWS = MIXED | SHORT | {"use_sliding_window": True, "max_window_layers": 0}


@pytest.mark.parametrize(
    "name, text",
    [
        ("Qwen2VL", {}),
        ("Qwen2VL", WINDOWS),
        ("Qwen2_5_VL", {}),
        ("Qwen2_5_VL", WINDOWS),
        ("Qwen3VL", {}),
        ("Qwen3_5", DELTA_NET),
    ],
)
def test_positions_of_three_kinds_in_a_text(name, text):
    """What has no image in it has one position for each token, also where a cache and its chat go on."""
    text = text | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    vision = {"depth": 1, "num_heads": 2, "patch_size": 4, "hidden_size": 16}
    vision |= {"out_hidden_size": 32, "deepstack_visual_indexes": [], "fullatt_block_indexes": [0], "embed_dim": 16}
    special = {"image_token_id": 11, "video_token_id": 12, "vision_start_token_id": 10, "vision_end_token_id": 10}
    target = with_images(name, text, vision, **special)
    for rotates in (False, True):
        draft = make_tiny_draft(target, rotate_soft_prompts=rotates)
        assert_same_text(target, draft)
        assert_same_chat(target, draft, prefill_chunk_size=3)
    # As a processor passes them.
    kinds = torch.zeros_like(PROMPT)
    options = {"do_sample": False, "max_new_tokens": 20}
    assert torch.equal(
        target.generate(PROMPT, mm_token_type_ids=kinds, **options),
        target.generate(PROMPT, mm_token_type_ids=kinds, assistant_model=draft, **options),
    )
    kinds[0, 2] = 1
    with pytest.raises(ValueError, match="A ConFu draft cannot pass `mm_token_type_ids`"):
        target.generate(PROMPT, mm_token_type_ids=kinds, assistant_model=draft, **options)


WRAPPED = {
    "Gemma3": "Gemma3Text, windows",
    "Gemma3n": "Gemma3nText, windows",
    "Gemma4": "Gemma4Text, ids in every layer",
}


@pytest.mark.parametrize("name", WRAPPED)
def test_texts_in_which_the_marks_of_images_occur(name, monkeypatch):
    """A model of text and images may write the id that marks an image, and reads it otherwise than other ids."""
    # Nothing reads an image or a sound here, and Gemma 3n would need one more library to do so.
    own = AutoModel.from_config
    monkeypatch.setattr(
        AutoModel,
        "from_config",
        lambda part, **options: own(part, **options) if "text" in part.model_type else nn.Identity(),
    )
    vision = VISION | {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 1, "vocab_offset": 11}
    marks = {"image_token_id": 11, "video_token_id": 10, "audio_token_id": 12}
    if name != "Gemma3":
        marks["audio_config"] = {"hidden_size": 16, "conf_num_hidden_layers": 1, "vocab_size": 1, "vocab_offset": 12}
    target = with_images(name, ARCHITECTURES[WRAPPED[name]] | {"vocab_size_per_layer_input": 11}, vision, **marks)
    draft = make_tiny_draft(target)
    options = {"do_sample": True, "temperature": 3.0, "max_new_tokens": 24}
    marks = 0
    for contemplation in (0, 5):
        comparison = compare(target, draft, PROMPT, options, KNOBS | {"contemplation": contemplation}, oracle=True)
        assert_identical(comparison)
        marks += int((comparison.plain.sequences[:, PROMPT.shape[1] :] > 9).sum())
    assert marks >= 6
    assert_same_chat(target, draft, prefill_chunk_size=3)


# Precision and place


PRECISIONS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("draft_dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("target_dtype", PRECISIONS, ids=str)
def test_draft_and_target_may_differ_in_precision(target_dtype, draft_dtype):
    target = make_tiny_target("llama", target_dtype, vocab_size=13)
    draft = make_tiny_draft(target, draft_dtype)
    if target_dtype == torch.float32:
        assert_same_text(target, draft)
        return
    # In half precision, rounding differs with the number of rows, so only a target of fp32 can be compared by text.
    config = confu_generation_config(
        target, do_sample=False, max_new_tokens=24, confu_tree_size=12, return_dict_in_generate=True
    )
    output = target.generate(PROMPT, assistant_model=draft, generation_config=config)
    assert output.sequences.shape == (1, PROMPT.shape[1] + 24)
    assert {layer.keys.dtype for layer in output.cache.layers} == {target_dtype}
    assert {parameter.dtype for parameter in draft.parameters()} == {draft_dtype}
    assert draft.last_statistics.tau > 1


class Int8Linear(nn.Module):
    """What quantised Linears have in common: no `weight`, and a product that is not `nn.Linear`'s."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.register_buffer("scale", linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127)
        self.register_buffer("levels", (linear.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states @ (self.levels * self.scale).T


def quantise(target, folder):
    for module in list(target.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child))


ONE_DEVICE = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
ONE_DEVICE |= {f"model.layers.{index}": "cpu" for index in range(5)}
PARTLY_ON_DISK = ONE_DEVICE | {"lm_head": "disk"} | {f"model.layers.{index}": "disk" for index in (2, 3, 4)}
LORA = {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4, "init_lora_weights": False}


def split(target, folder):
    dispatch_model(target, ONE_DEVICE, force_hooks=True)


def offload(target, folder):
    cpu_offload(target, torch.device("cpu"))


def offload_to_disk(target, folder):
    disk_offload(target, str(folder), torch.device("cpu"))


def offload_a_part(target, folder):
    dispatch_model(target, PARTLY_ON_DISK, main_device="cpu", offload_dir=str(folder))


def add_adapter(target, folder):
    target.add_adapter(LoraConfig(**LORA))
    target.double().eval()


def load_adapter(target, folder):
    get_peft_model(make_target("Llama"), LoraConfig(task_type="CAUSAL_LM", **LORA)).save_pretrained(folder)
    target.load_adapter(str(folder))
    target.double().eval()


NEEDS_NEWER_PEFT = pytest.mark.skipif(
    version.parse(peft.__version__) < version.parse(MIN_PEFT_VERSION),
    reason=f"`add_adapter` of this Transformers needs peft {MIN_PEFT_VERSION}",
)


@pytest.mark.parametrize("change", [split, offload, offload_to_disk, offload_a_part])
def test_a_target_spread_by_accelerate(change, tmp_path):
    target = make_target("Llama")
    draft = make_tiny_draft(target, rotate_soft_prompts=True)
    change(target, tmp_path)
    assert_same_text(target, draft)


@pytest.mark.parametrize("change", [quantise, pytest.param(add_adapter, marks=NEEDS_NEWER_PEFT), load_adapter])
def test_a_target_with_other_modules(change, tmp_path):
    target = make_target("Llama")
    draft = make_tiny_draft(target)
    before = target.generate(PROMPT, max_new_tokens=24, do_sample=False)
    torch.manual_seed(0)
    change(target, tmp_path)
    assert not torch.equal(target.generate(PROMPT, max_new_tokens=24, do_sample=False), before)  # they are felt
    assert_same_text(target, draft)


def test_a_target_wrapped_by_peft():
    target = make_target("Llama")
    draft = make_tiny_draft(target)
    torch.manual_seed(0)
    wrapped = get_peft_model(target, LoraConfig(task_type="CAUSAL_LM", **LORA)).double().eval()
    assert_same_text(wrapped, draft)
    with wrapped.disable_adapter():
        assert_same_text(wrapped, draft)


def test_a_target_over_several_devices_is_named_no_rows(monkeypatch):
    """Its last states lie elsewhere than its inputs, and a tensor of row numbers would have to lie with them."""
    target = make_target("Llama")
    draft = make_tiny_draft(target)
    monkeypatch.setattr(target, "hf_device_map", {"model": "cpu", "lm_head": "cuda:1"}, raising=False)
    asked = []
    target.register_forward_pre_hook(lambda module, args, kwargs: asked.append(kwargs), with_kwargs=True)
    assert_same_text(target, draft)
    assert asked and not any(isinstance(kwargs.get("logits_to_keep"), torch.Tensor) for kwargs in asked)


# Compilation


@pytest.mark.slow
@pytest.mark.parametrize("way", ["module", "forward"])
def test_a_compiled_target(way):
    target = make_target("Llama", num_hidden_layers=2)
    draft = make_tiny_draft(target, target_hidden_state_indices=[1, 2])
    if way == "module":
        target.compile(backend="eager", dynamic=True)
    else:
        target.forward = torch.compile(target.forward, backend="eager", dynamic=True)
    try:
        assert_same_text(target, draft, max_new_tokens=10)
    finally:
        torch.compiler.reset()
