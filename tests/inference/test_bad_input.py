"""Wrong calls: each raises the right exception with a sentence that helps, and before the target computes anything."""

from functools import partial

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    GenerationConfig,
    LlamaForCausalLM,
    StaticCache,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from helpers import make_family, make_tiny_draft, make_tiny_target
from transformers_confu import ConFuConfig, ConFuGenerate, confu_generation_config


PROMPT = torch.tensor([[3, 14, 15, 92, 65]])
BATCH = PROMPT.expand(2, -1)


@pytest.fixture(scope="module")
def llama():
    return make_tiny_target()


@pytest.fixture
def count_forwards():
    """Count the calls of a target's forward, whatever it is wrapped in."""
    counts = []

    def watch(target):
        handle = target.register_forward_pre_hook(lambda *_: counts.append(1))
        handles.append(handle)
        return counts

    handles = []
    yield watch
    for handle in handles:
        handle.remove()


def generate(target, draft, input_ids=PROMPT, **kwargs):
    """Route A."""
    return target.generate(input_ids, assistant_model=draft, **{"max_new_tokens": 4, "do_sample": False} | kwargs)


def generate_b(target, draft, input_ids=PROMPT, **kwargs):
    """Route B, where Transformers checks much less."""
    return target.generate(
        input_ids, custom_generate=ConFuGenerate(draft), **{"max_new_tokens": 4, "do_sample": False} | kwargs
    )


class CacheOfMine(DynamicCache):
    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        return super().update(2 * key_states, value_states, layer_idx, *args, **kwargs)


class QuantisedLayer(DynamicLayer):
    """Stands for the layers of a quantised cache, which hold most rows elsewhere."""


def cache_of(*layers) -> DynamicCache:
    cache = DynamicCache()
    cache.layers = list(layers)
    return cache


def filled_cache(rows: int) -> DynamicCache:
    cache = DynamicCache()
    for index in range(5):
        cache.update(*torch.zeros(2, 1, 2, rows, 8, dtype=torch.float64), index)
    return cache


def mask(*columns: int) -> dict:
    return {"attention_mask": torch.tensor([columns])}


def knob(**values) -> dict:
    return {"generation_config": GenerationConfig(max_new_tokens=4, **values)}


NARROW = {"draft": {"hidden_size": 16, "head_dim": 4}}
STATIC = {"cache": StaticCache(make_tiny_target().config, max_cache_len=7)}
QUANTISED = {"cache": cache_of(*(QuantisedLayer() for _ in range(5)))}
SLIDING = {"cache": cache_of(*(DynamicSlidingWindowLayer(4) for _ in range(5)))}
TWO_MASKS = {"attention_mask": torch.tensor([[0, 1, 1, 1, 1]] * 2)}
# Arguments of a call (`draft`: entries of the draft's config), and what it is told.
IN_A = [
    ({"input_ids": BATCH}, "assisted generate is only supported for batch_size = 1, got 2"),
    ({"use_cache": False}, "requires `use_cache=True`"),
    ({"synced_gpus": True}, "`synced_gpus=True` keeps processes in step"),
    ({"assistant_ensemble_weight": 0.5}, "`assistant_ensemble_weight` mixes the draft's distribution into the text"),
    (
        NARROW | {"input_ids": None, "inputs_embeds": torch.zeros(1, 5, 32).double()},
        "This draft embeds tokens itself (hidden_size 16, target 32) and cannot read `inputs_embeds`; pass",
    ),
    ({"position_ids": torch.arange(5).expand(3, 1, 5)}, "of shape (batch, length), got (3, 1, 5); pass"),
    ({"position_ids": torch.arange(5)}, "of shape (batch, length), got (5,); pass shape (1, 5), and use plain"),
    ({"position_ids": torch.arange(3)[None]}, "has shape (1, 3), but the inputs add 5 tokens; it needs shape (1, 5)."),
    (mask(0, 1, 1), "`attention_mask` covers 3 tokens, but the inputs are 5; it needs a column for every token."),
    (mask(1, 1, 1), "`attention_mask` covers 3 tokens, but the inputs are 5"),
    (mask(0, 1, 1, 1, 1, 1) | {"cache": filled_cache(3)}, "but the inputs are 5 and the cache holds 3"),
    (TWO_MASKS, "`attention_mask` has 2 rows, but the input is one text; it needs one row."),
    ({"input_ids": PROMPT[:, :0]}, "The inputs hold no token; pass at least one."),
    ({"prefill_chunk_size": 0}, "`prefill_chunk_size` is 0; it must be at least 1, or None for no chunks."),
    ({"logits_to_keep": torch.tensor([9])}, "`logits_to_keep` is tensor([9]); decoding reads the last row's logits"),
    ({"use_mtp": True}, "`use_mtp=True` asks for another source of guesses than the draft that is given"),
    ({"assistant_tokenizer": object(), "tokenizer": object()}, "`assistant_tokenizer` is not required"),
    # Caches
    ({"cache_implementation": "offloaded_static"}, "of full attention alone, got an offloaded StaticCache; leave"),
    (STATIC, "The static cache holds 7 tokens at most, but the text may need 8; make it larger (`max_cache_len`), or"),
    ({"cache": DynamicCache(offloading=True)}, "needs a plain, non-offloaded DynamicCache that is like"),
    (QUANTISED, "got a DynamicCache with layers of type QuantisedLayer; leave `cache_implementation`"),
    (SLIDING, "got a DynamicCache whose layers have windows 4, where those of the target have None; leave"),
    ({"cache": CacheOfMine()}, "got a CacheOfMine with an `update` of its own; leave"),
    (
        {"draft": {"target_num_key_value_heads": 1}, "cache": filled_cache(2)},
        "The target caches 2 key/value heads of size 8, but the draft's soft prompts are for 1 of size 8",
    ),
    ({"cache": filled_cache(5)}, "The cache holds 5 tokens and the inputs add none; the newest token must not"),
    # A draft for another target
    ({"draft": {"vocab_size": 98}}, "The main and assistant models have different tokenizers."),
    ({"draft": {"target_hidden_size": 64}}, "made for a target with `hidden_size=64`, but LlamaForCausalLM has 32"),
    ({"draft": {"target_num_hidden_layers": 7}}, "with `num_hidden_layers=7`, but LlamaForCausalLM has 5"),
    # Knobs
    (knob(confu_tree=16), "`confu_tree` is no knob of ConFu; did you mean `confu_tree_size`? There are"),
    (knob(confu_branching=10**6), "`confu_branching` is 1000000; it must be at most 1024"),
    ({"confu_tree_size": 16}, "The following `model_kwargs` are not used by the model: ['confu_tree_size']"),
    (knob(confu_tree_size=0), "`confu_tree_size` is 0; it must be an integer of at least 1."),
    (knob(confu_tree_size="30"), "`confu_tree_size` is '30'; it must be an integer of at least 1."),
    (knob(confu_depth=[6]), "`confu_depth` is [6]; it must be an integer of at least 1."),
    (knob(confu_branching=True), "`confu_branching` is True; it must be an integer of at least 1."),
    (knob(confu_contemplation=-1), "`confu_contemplation` is -1; it must be an integer of at least 0."),
    (knob(confu_future_gain="much"), "`confu_future_gain` is 'much'; it must be a number of tokens."),
]
IN_B = [
    ({"num_beams": 2}, "`num_beams` is 2; a ConFu draft assists greedy"),
    ({"do_sample": True, "num_return_sequences": 2}, "num_return_sequences has to be 1 when doing assisted generate"),
    ({"prompt_lookup_num_tokens": 3}, "`prompt_lookup_num_tokens=3` asks for another source of guesses"),
    ({"draft": {"vocab_size": 98}}, "for a target with `vocab_size=98`, but LlamaForCausalLM has 97; load the"),
]


@pytest.mark.parametrize(
    "route, arguments, sentence", [(generate, *row) for row in IN_A] + [(generate_b, *row) for row in IN_B]
)
def test_a_wrong_call_raises_before_any_forward(llama, count_forwards, route, arguments, sentence):
    forwards = count_forwards(llama)
    draft = make_tiny_draft(llama, **arguments.get("draft", {}))
    with pytest.raises(ValueError) as error:
        route(llama, draft, **{name: value for name, value in arguments.items() if name != "draft"})
    assert sentence in str(error.value)
    assert not forwards


@pytest.mark.parametrize(
    "options, sentence",
    [
        (
            {"confu_contemplating": 4},
            "`confu_contemplating` is no knob of ConFu; did you mean `confu_contemplation`?",
        ),
        ({"max_new_token": 4}, "`max_new_token`: no option of `generate`, no knob of ConFu."),
        (
            {"bos_token_id": None, "pad_token_id": None},
            "`bos_token_id=None`: `generate` fills what is None in a `GenerationConfig` from the target's own; give",
        ),
    ],
)
def test_a_wrong_configuration_of_a_call_is_not_made(llama, options, sentence):
    with pytest.raises(ValueError) as error:
        confu_generation_config(llama, **options)
    assert sentence in str(error.value)


def test_a_wrong_call_leaves_the_draft_as_it_was(llama):
    draft = make_tiny_draft(llama)
    generate(llama, draft)
    statistics = draft.last_statistics
    with pytest.raises(ValueError):
        generate(llama, draft, BATCH)
    assert draft.last_statistics is statistics


@pytest.mark.parametrize("whose", [0, 1], ids=["target", "draft"])
def test_a_wrong_default_knob_is_refused(llama, count_forwards, monkeypatch, whose):
    draft, forwards = make_tiny_draft(llama), count_forwards(llama)
    monkeypatch.setattr((llama, draft)[whose].generation_config, "confu_dept", 3, raising=False)
    with pytest.raises(ValueError, match="`confu_dept` is no knob of ConFu; did you mean `confu_depth`?"):
        generate(llama, draft)
    assert not forwards


def test_a_target_with_other_heads_is_refused_before_the_prompt(llama):
    """Their number is only known from a forward, and the self-check has the first one."""
    draft = make_tiny_draft(llama, target_num_key_value_heads=1, target_head_dim=16)
    lengths = []
    handle = llama.register_forward_pre_hook(lambda module, args, kwargs: lengths.append(kwargs), with_kwargs=True)
    sentence = "The target caches 2 key/value heads of size 8, but the draft's soft prompts are for 1 of size 16"
    with pytest.raises(ValueError, match=sentence):
        generate(llama, draft, PROMPT.repeat(1, 4))
    handle.remove()
    assert [kwargs["input_ids"].shape[1] for kwargs in lengths] == [4, 1, 1, 1]


def test_static_caches_have_no_windows():
    target = make_tiny_target("windows")
    draft = make_tiny_draft(target)
    with pytest.raises(ValueError, match="got a StaticCache with layers of type StaticSlidingWindowLayer; leave"):
        generate(target, draft, cache_implementation="static")
    with pytest.raises(ValueError, match="got a StaticCache for layers with windows 6, None; leave"):
        generate(target, draft, cache=StaticCache(make_tiny_target().config, max_cache_len=64))


def test_latent_attention_has_no_place_for_soft_prompts():
    latent = {"kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "q_lora_rank": None}
    target = make_family("DeepseekV3", head_dim=4, num_key_value_heads=4, first_k_dense_replace=5, **latent)
    with pytest.raises(ValueError, match="DeepseekV3Config caches keys and values of different .* to 0, got 4\\."):
        make_tiny_draft(target)
    assert ConFuConfig.from_target(target.config).num_soft_prompts == 0
    draft = make_tiny_draft(make_tiny_target())  # one that was made for another target
    with pytest.raises(ValueError, match=r"caches 1 key/value heads of size 16, and values of 1 heads of size 4, but"):
        generate(target, draft)
    text = generate(target, draft, **knob(confu_contemplation=0))
    assert torch.equal(text, target.generate(PROMPT, max_new_tokens=4))


# Targets


def changed(**attributes):
    """A Llama with attributes set by hand on its configuration."""
    target = make_tiny_target()
    for name, value in attributes.items():
        setattr(target.config, name, value)
    return target


def encoder_decoder():
    target = make_family("T5", AutoModelForSeq2SeqLM, d_model=32, num_layers=5, num_heads=4, d_kv=8)
    target.generation_config.decoder_start_token_id = 0
    return target


def with_activated_lora():
    target = make_tiny_target()
    options = {"target_modules": ["q_proj"], "alora_invocation_tokens": [3, 14], "task_type": TaskType.CAUSAL_LM}
    get_peft_model(target, LoraConfig(**options))  # in place
    return target


def sharded_by_tensor_parallelism():
    target = make_tiny_target()
    target._tp_size = 2
    return target


class StatefulLlama(LlamaForCausalLM):
    """Stands for RWKV and the like."""

    _is_stateful = True


def stateful():
    target = make_tiny_target()
    target.__class__ = StatefulLlama
    return target


def with_another_forward():
    """A `forward` in the place of the model's own, which forgets what the other takes."""
    target = make_tiny_target()
    own = target.forward

    def forward(input_ids=None, attention_mask=None, cache=None, **kwargs):
        return own(input_ids, attention_mask=attention_mask, cache=cache, **kwargs)

    target.forward = forward
    return target


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "num_local_experts": 0}
MAMBA |= {"layer_types": ["linear_attention"] * 5}
HYBRID = {"layer_types": ["linear_attention"] * 4 + ["full_attention"]}
LOOPED = {"n_input_layers": 2, "n_recurrent_layers": 2, "n_output_layers": 2, "num_hidden_layers": 6}
LOOPED |= {"layer_types": ["full_attention"] * 6, "n_recurrent_loops": 2}
SCALED = {"layer_types": ["full_attention"] * 5, "no_rope_layers": [1, 0, 1, 1, 0], "moe_layers": []}
SCALED |= {"attn_temperature_tuning": True, "floor_scale": 4, "intermediate_size_mlp": 64, "pad_token_id": 0}
TARGETS = [
    (with_another_forward, "put in the place of LlamaForCausalLM's own takes no `inputs_embeds`, `position_ids`"),
    (encoder_decoder, "T5ForConditionalGeneration is an encoder-decoder model; ConFu drafts for decoder-only models."),
    (stateful, "StatefulLlama keeps its state elsewhere than in a cache, and cannot return to an earlier one"),
    (partial(changed, _attn_implementation="flash_attention_2"), "2'`, which cannot take the mask of a tree; load it"),
    (
        partial(changed, layer_types=["chunked_attention"] * 5, attention_chunk_size=8),
        "LlamaForCausalLM has layers of type chunked_attention, whose cache cannot hold a tree",
    ),
    (partial(make_family, "GraniteMoeHybrid", **MAMBA), "has recurrent layers alone; ConFu needs a target with"),
    (
        partial(make_family, "MiniMax", **HYBRID),
        "MiniMaxForCausalLM has recurrent layers of a kind that ConFu does not know",
    ),
    (partial(make_family, "GPTNeo", attention_types=[[["global"] * 5, 1]]), "masks attention by the order of rows,"),
    (partial(make_family, "Dory", **LOOPED), "runs through layers several times (`n_recurrent_loops=2`), and"),
    (partial(make_family, "Llama4Text", **SCALED), "scales queries by the number of rows before them"),
    (partial(make_family, "Falcon", alibi=True), "FalconForCausalLM counts rows for its positions (`alibi=True`)"),
    (partial(make_family, "Bloom"), "BloomForCausalLM.forward takes no `position_ids`, which a draft tree needs."),
    (
        partial(make_family, "Llama", rope_parameters=DYNAMIC),
        "uses RoPE type 'dynamic', whose frequencies change with",
    ),
    (partial(changed, rope_parameters={"full_attention": DYNAMIC}), "LlamaForCausalLM uses RoPE type 'dynamic'"),
    (partial(changed, hidden_size_per_layer_input=8), "looks token ids up in every layer (`hidden_size_per"),
    (
        partial(make_family, "OPT", ffn_dim=64, word_embed_proj_dim=16),
        "embeddings of size 16 and hidden states of size 32",
    ),
    (with_activated_lora, "has an activated LoRA (`alora_invocation_tokens`), which peft applies to the last rows"),
    (sharded_by_tensor_parallelism, "LlamaForCausalLM is loaded with tensor parallelism over 2 processes"),
]


@pytest.mark.parametrize("build, sentence", TARGETS)
def test_a_target_that_cannot_verify_trees_is_refused(build, sentence, count_forwards):
    target = build()
    # A draft that would fit by its sizes.
    layers = target.config.get_text_config(decoder=True).num_hidden_layers
    draft = make_tiny_draft(make_tiny_target(num_hidden_layers=layers), vocab_size=target.config.vocab_size)
    forwards = count_forwards(target)
    # Route B, as Transformers refuses some of them itself in route A.
    with pytest.raises(ValueError) as error:
        generate_b(target, draft)
    assert sentence in str(error.value)
    assert not forwards


def test_images_are_refused(count_forwards):
    text = make_tiny_target().config.to_dict()
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    sizes = {"text_config": text, "vision_config": vision, "image_token_id": 96, "image_seq_length": 4}
    target = make_family("Llava", AutoModelForImageTextToText, **sizes)
    draft, forwards = make_tiny_draft(target), count_forwards(target)
    prompt = torch.cat([torch.full((1, 4), 96), PROMPT], dim=1)
    # Transformers has turned them into something else by then.
    with pytest.raises(ValueError, match="A ConFu draft cannot pass .* it works with text inputs"):
        generate(target, draft, prompt, pixel_values=torch.zeros(1, 3, 8, 8))
    assert not forwards


def test_prompt_tuning_is_refused(count_forwards):
    target = make_tiny_target()
    draft, forwards = make_tiny_draft(target), count_forwards(target)
    tuned = get_peft_model(target, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3))
    with pytest.raises(ValueError, match="PeftModelForCausalLM has an active peft prompt-learning adapter"):
        tuned.generate(input_ids=PROMPT, assistant_model=draft, max_new_tokens=4)
    assert not forwards


# Wrong uses of the classes


def test_stop_strings_need_a_tokenizer(llama):
    with pytest.raises(ValueError, match="`stop_strings` without `tokenizer`: pass the target's tokenizer too."):
        ConFuGenerate(make_tiny_draft(llama), stop_strings=["."])
