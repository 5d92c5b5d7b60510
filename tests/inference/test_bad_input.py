"""Wrong calls: each raises the right exception with a sentence that helps, and before the target computes anything."""

import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    GenerationConfig,
    LlamaForCausalLM,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from helpers import make_tiny_draft, make_tiny_target
from transformers_confu import ConFuConfig, ConFuDraftModel, ConFuGenerate, confu_generation_config


PROMPT = torch.tensor([[3, 14, 15, 92, 65]])
BATCH = PROMPT.expand(2, -1)
LLAMA_SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


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


def with_knobs(target, **knobs):
    return GenerationConfig(max_new_tokens=4, **knobs)


class QuantisedLayer(DynamicLayer):
    """Stands for the layers of a quantised cache, which hold most rows elsewhere."""


def cache_of(layer_class, layers: int = 5) -> DynamicCache:
    cache = DynamicCache()
    cache.layers = [
        layer_class(4) if layer_class is DynamicSlidingWindowLayer else layer_class() for _ in range(layers)
    ]
    return cache


def filled_cache(target, rows: int) -> DynamicCache:
    cache = DynamicCache()
    for index in range(target.config.num_hidden_layers):
        cache.update(*torch.zeros(2, 1, 2, rows, 8, dtype=target.dtype), index)
    return cache


CALLS = {
    # What one call asks for
    "batch of 2": (
        lambda t, d: generate(t, d, BATCH),
        "assisted generate is only supported for batch_size = 1, got 2",
    ),
    "batch of 2 in route B": (
        lambda t, d: generate_b(t, d, BATCH),
        "assisted generate is only supported for batch_size = 1, got 2",
    ),
    "beams in route B": (lambda t, d: generate_b(t, d, num_beams=2), "`num_beams` is 2; a ConFu draft assists greedy"),
    "return sequences": (
        lambda t, d: generate(t, d, do_sample=True, num_return_sequences=2),
        "num_return_sequences has to be 1 when doing assisted generate, but is 2.",
    ),
    "return sequences in route B": (
        lambda t, d: generate_b(t, d, do_sample=True, num_return_sequences=2),
        "num_return_sequences has to be 1 when doing assisted generate, but is 2.",
    ),
    "no cache": (lambda t, d: generate(t, d, use_cache=False), "requires `use_cache=True`"),
    "no cache in route B": (lambda t, d: generate_b(t, d, use_cache=False), "requires `use_cache=True`"),
    "synced_gpus": (lambda t, d: generate(t, d, synced_gpus=True), "`synced_gpus=True` keeps processes in step"),
    "assistant_ensemble_weight": (
        lambda t, d: generate(t, d, assistant_ensemble_weight=0.5),
        "`assistant_ensemble_weight` mixes the draft's distribution into the text",
    ),
    "positions in 3 dimensions": (
        lambda t, d: generate(t, d, position_ids=torch.arange(5).expand(3, 1, 5)),
        "ConFu needs `position_ids` of shape (batch, length), got (3, 1, 5)",
    ),
    "own embeddings for a draft that reads ids": (
        lambda t, d: generate(
            t,
            make_tiny_draft(t, hidden_size=16, head_dim=4),
            None,
            inputs_embeds=torch.zeros(1, 5, 32, dtype=torch.float64),
        ),
        "This draft embeds tokens itself (hidden_size 16, target 32) and cannot read `inputs_embeds`; pass",
    ),
    "positions in 1 dimension": (
        lambda t, d: generate(t, d, position_ids=torch.arange(5)),
        "ConFu needs `position_ids` of shape (batch, length), got (5,); pass shape (1, 5), and use",
    ),
    "positions shorter than the ids": (
        lambda t, d: generate(t, d, position_ids=torch.arange(3)[None]),
        "`position_ids` has shape (1, 3), but the inputs add 5 tokens; it needs shape (1, 5).",
    ),
    "mask shorter than the ids": (
        lambda t, d: generate(t, d, attention_mask=torch.tensor([[0, 1, 1]])),
        "`attention_mask` covers 3 tokens, but the inputs are 5; it needs a column for every token.",
    ),
    "mask of ones shorter than the ids": (
        lambda t, d: generate(t, d, attention_mask=torch.ones(1, 3, dtype=torch.long)),
        "`attention_mask` covers 3 tokens, but the inputs are 5",
    ),
    "mask longer than the ids": (
        lambda t, d: generate_b(t, d, attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1, 1]])),
        "`attention_mask` covers 7 tokens, but the inputs are 5",
    ),
    "mask of another length than cache and ids": (
        lambda t, d: generate(t, d, cache=filled_cache(t, 3), attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1]])),
        "`attention_mask` covers 6 tokens, but the inputs are 5 and the cache holds 3",
    ),
    "mask of two texts": (
        lambda t, d: generate(t, d, attention_mask=torch.tensor([[0, 1, 1, 1, 1]] * 2)),
        "`attention_mask` has 2 rows, but the input is one text; it needs one row.",
    ),
    "no tokens": (
        lambda t, d: generate(t, d, torch.zeros(1, 0, dtype=torch.long)),
        "The inputs hold no token; pass at least one.",
    ),
    "chunks of no token": (
        lambda t, d: generate(t, d, prefill_chunk_size=0),
        "`prefill_chunk_size` is 0; it must be at least 1, or None for no chunks.",
    ),
    "logits of named rows": (
        lambda t, d: generate(t, d, logits_to_keep=torch.tensor([9])),
        "`logits_to_keep` is tensor([9]); decoding reads the last row's logits",
    ),
    "another source of guesses": (
        lambda t, d: generate(t, d, use_mtp=True),
        "`use_mtp=True` asks for another source of guesses than the draft that is given",
    ),
    "prompt lookup beside a draft": (
        lambda t, d: generate_b(t, d, prompt_lookup_num_tokens=3),
        "`prompt_lookup_num_tokens=3` asks for another source of guesses",
    ),
    "tokenizers of an equal vocabulary": (
        lambda t, d: generate(t, d, assistant_tokenizer=object(), tokenizer=object()),
        "`assistant_tokenizer` is not required",
    ),
    # Caches
    "static cache": (lambda t, d: generate(t, d, cache_implementation="static"), "got a StaticCache; leave"),
    "static cache in route B": (
        lambda t, d: generate_b(t, d, cache_implementation="static"),
        "got a StaticCache; leave",
    ),
    "offloaded cache": (
        lambda t, d: generate(t, d, cache=DynamicCache(offloading=True)),
        "ConFu decoding needs a plain, non-offloaded DynamicCache that is like the target's layers, got an offloaded",
    ),
    "quantised cache": (
        lambda t, d: generate(t, d, cache=cache_of(QuantisedLayer)),
        "got a DynamicCache with layers of type QuantisedLayer; leave `cache_implementation`",
    ),
    "sliding cache": (
        lambda t, d: generate(t, d, cache=cache_of(DynamicSlidingWindowLayer)),
        "got a DynamicCache whose layers have windows 4, where those of the target have None; leave",
    ),
    "cache of another target": (
        lambda t, d: generate(t, make_tiny_draft(t, target_num_key_value_heads=1), cache=filled_cache(t, 2)),
        "The target caches 2 key/value heads of size 8, but the draft's soft prompts are for 1 of size 8",
    ),
    "cache that holds all inputs": (
        lambda t, d: generate(t, d, cache=filled_cache(t, 5)),
        "The cache holds 5 tokens and the inputs add none; the newest token must not be cached.",
    ),
    # A draft for another target
    "vocabulary": (
        lambda t, d: generate(t, make_tiny_draft(t, vocab_size=98)),
        "The main and assistant models have different tokenizers.",
    ),
    "vocabulary in route B": (
        lambda t, d: generate_b(t, make_tiny_draft(t, vocab_size=98)),
        "The draft was made for a target with `vocab_size=98`, but LlamaForCausalLM has 97; load the target named",
    ),
    "width": (
        lambda t, d: generate(t, make_tiny_draft(t, target_hidden_size=64)),
        "The draft was made for a target with `hidden_size=64`, but LlamaForCausalLM has 32",
    ),
    "depth": (
        lambda t, d: generate(t, make_tiny_draft(t, target_num_hidden_layers=7)),
        "The draft was made for a target with `num_hidden_layers=7`, but LlamaForCausalLM has 5",
    ),
    # Knobs
    "unknown knob in the call": (
        lambda t, d: generate(t, d, generation_config=with_knobs(t, confu_tree=16)),
        "`confu_tree` is no knob of ConFu; did you mean `confu_tree_size`? There are confu_tree_size, confu_depth,",
    ),
    "unknown knob of confu_generation_config": (
        lambda t, d: confu_generation_config(t, confu_contemplating=4),
        "`confu_contemplating` is no knob of ConFu; did you mean `confu_contemplation`?",
    ),
    "unknown option of confu_generation_config": (
        lambda t, d: confu_generation_config(t, max_new_token=4),
        "`max_new_token`: no option of `generate`, no knob of ConFu.",
    ),
    "option of the target that a configuration cannot unset": (
        lambda t, d: confu_generation_config(t, bos_token_id=None, pad_token_id=None),
        "`bos_token_id=None`: `generate` fills what is None in a `GenerationConfig` from the target's own; give it to",
    ),
    "a tree beyond all memory": (
        lambda t, d: generate(t, d, generation_config=with_knobs(t, confu_tree_size=10**6)),
        "`confu_tree_size` is 1000000; it must be at most 1024",
    ),
    "branches beyond all memory": (
        lambda t, d: generate(t, d, generation_config=with_knobs(t, confu_branching=10**6)),
        "`confu_branching` is 1000000; it must be at most 1024",
    ),
    "knob as a keyword": (
        lambda t, d: generate(t, d, confu_tree_size=16),
        "The following `model_kwargs` are not used by the model: ['confu_tree_size']",
    ),
} | {
    f"{name}={value!r}": (
        lambda t, d, name=name, value=value: generate(t, d, generation_config=with_knobs(t, **{name: value})),
        f"`{name}` is {value!r}; it must be an integer of at least {least}.",
    )
    for name, value, least in (
        ("confu_tree_size", 0, 1),
        ("confu_tree_size", "30", 1),
        ("confu_tree_size", 30.0, 1),
        ("confu_depth", 0, 1),
        ("confu_depth", [6], 1),
        ("confu_branching", -2, 1),
        ("confu_branching", True, 1),
        ("confu_contemplation", -1, 0),
    )
}


@pytest.mark.parametrize("call, sentence", CALLS.values(), ids=CALLS.keys())
def test_a_wrong_call_raises_before_any_forward(llama, count_forwards, call, sentence):
    forwards = count_forwards(llama)
    with pytest.raises(ValueError) as error:
        call(llama, make_tiny_draft(llama))
    assert sentence in str(error.value)
    assert not forwards


def test_a_wrong_call_leaves_the_draft_as_it_was(llama):
    draft = make_tiny_draft(llama)
    generate(llama, draft)
    statistics = draft.last_statistics
    with pytest.raises(ValueError):
        generate(llama, draft, BATCH)
    assert draft.last_statistics is statistics


@pytest.mark.parametrize("whose", ["target", "draft"])
def test_a_wrong_default_knob_is_refused(llama, count_forwards, whose):
    draft, forwards = make_tiny_draft(llama), count_forwards(llama)
    owner = llama if whose == "target" else draft
    owner.generation_config.confu_dept = 3
    try:
        with pytest.raises(ValueError, match="`confu_dept` is no knob of ConFu; did you mean `confu_depth`?"):
            generate(llama, draft)
    finally:
        del owner.generation_config.confu_dept
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


def test_latent_attention_has_no_place_for_soft_prompts():
    settings = LLAMA_SIZES | {"num_key_value_heads": 4, "first_k_dense_replace": 5}
    settings |= {
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    }
    del settings["head_dim"]
    config = transformers.DeepseekV3Config(**settings)
    target = AutoModelForCausalLM.from_config(config).double().eval()
    with pytest.raises(ValueError, match="DeepseekV3Config caches keys and values of different .* to 0, got 4\\."):
        make_tiny_draft(target)
    assert ConFuConfig.from_target(config).num_soft_prompts == 0
    draft = make_tiny_draft(make_tiny_target())  # one that was made for another target
    with pytest.raises(ValueError, match=r"caches 1 key/value heads of size 16, and values of 1 heads of size 4, but"):
        generate(target, draft)
    text = generate(target, draft, generation_config=with_knobs(target, confu_contemplation=0))
    assert torch.equal(text, target.generate(PROMPT, max_new_tokens=4))


# Targets


def changed(**attributes):
    """A Llama with attributes set by hand on its configuration."""

    def build():
        target = make_tiny_target()
        for name, value in attributes.items():
            setattr(target.config, name, value)
        return target

    return build


def from_config(name: str, auto_class=AutoModelForCausalLM, **settings):
    def build():
        config = getattr(transformers, f"{name}Config")(**settings)
        target = auto_class.from_config(config).eval()
        target.generation_config.eos_token_id = None
        target.generation_config.decoder_start_token_id = 0  # where there is a decoder apart
        return target

    return build


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
    """Stands for Mamba and the like."""

    _is_stateful = True


def stateful():
    target = make_tiny_target()
    target.__class__ = StatefulLlama
    return target


GPT_SIZES = {"vocab_size": 97, "hidden_size": 32, "eos_token_id": None}


def with_another_forward():
    """A `forward` in the place of the model's own, which forgets what the other takes."""
    target = make_tiny_target()
    own = target.forward

    def forward(input_ids=None, attention_mask=None, cache=None, **kwargs):
        return own(input_ids, attention_mask=attention_mask, cache=cache, **kwargs)

    target.forward = forward
    return target


TARGETS = {
    "another forward": (
        with_another_forward,
        "The `forward` that was put in the place of LlamaForCausalLM's own takes no `inputs_embeds`, `position_ids`",
    ),
    "encoder and decoder": (
        from_config("T5", AutoModelForSeq2SeqLM, vocab_size=97, d_model=32, num_layers=5, num_heads=4, d_kv=8),
        "T5ForConditionalGeneration is an encoder-decoder model; ConFu drafts for decoder-only models.",
    ),
    "stateful": (stateful, "StatefulLlama is stateful: it cannot return to an earlier state"),
    "FlashAttention": (
        changed(_attn_implementation="flash_attention_2"),
        "LlamaForCausalLM uses `attn_implementation='flash_attention_2'`, which cannot take the mask of a tree",
    ),
    "flex attention": (changed(_attn_implementation="flex_attention"), "load it with 'sdpa' or 'eager'."),
    "chunks": (
        changed(layer_types=["chunked_attention"] * 5, attention_chunk_size=8),
        "LlamaForCausalLM has layers of type chunked_attention, whose cache cannot hold a tree",
    ),
    "convolutions": (
        from_config("Lfm2", **LLAMA_SIZES, layer_types=["conv", "full_attention"] * 2 + ["conv"]),
        "Lfm2ForCausalLM has layers of type conv, whose cache cannot hold a tree",
    ),
    "linear attention": (
        from_config(
            "Qwen3Next",
            **LLAMA_SIZES,
            layer_types=["linear_attention", "full_attention"] * 2 + ["linear_attention"],
            linear_num_value_heads=2,
            linear_num_key_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            num_experts=0,
        ),
        ("linear_attention", "stateful"),
    ),
    "row order instead of a mask": (
        from_config("GPTNeo", **GPT_SIZES, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]),
        "GPTNeoForCausalLM masks attention by the order of rows, whatever mask it is given",
    ),
    "ALiBi": (
        from_config("Falcon", **GPT_SIZES, num_hidden_layers=5, num_attention_heads=4, alibi=True),
        "FalconForCausalLM counts rows for its positions (`alibi=True`)",
    ),
    "no position_ids": (
        from_config("Bloom", **GPT_SIZES, n_layer=5, n_head=4),
        "BloomForCausalLM.forward takes no `position_ids`, which a draft tree needs.",
    ),
    "dynamic RoPE": (
        from_config(
            "Llama", **LLAMA_SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
        ),
        "LlamaForCausalLM uses RoPE type 'dynamic', whose frequencies change with the length of the forward",
    ),
    "longrope": (
        from_config(
            "Phi3",
            **LLAMA_SIZES | {"max_position_embeddings": 256},
            original_max_position_embeddings=128,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
            },
        ),
        "Phi3ForCausalLM uses RoPE type 'longrope'",
    ),
    "ids looked up in every layer": (
        changed(hidden_size_per_layer_input=8),
        "LlamaForCausalLM looks token ids up in every layer (`hidden_size_per_layer_input`)",
    ),
    "RoPE that is dynamic for full attention": (
        changed(rope_parameters={"full_attention": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
        "LlamaForCausalLM uses RoPE type 'dynamic'",
    ),
    "embeddings of another size": (
        from_config("OPT", **LLAMA_SIZES, ffn_dim=64, word_embed_proj_dim=16),
        "OPTForCausalLM has embeddings of size 16 and hidden states of size 32",
    ),
    "activated LoRA": (
        with_activated_lora,
        "LlamaForCausalLM has an activated LoRA (`alora_invocation_tokens`), which peft applies to the last rows",
    ),
    "tensor parallelism": (
        sharded_by_tensor_parallelism,
        "LlamaForCausalLM is loaded with tensor parallelism over 2 processes",
    ),
}


@pytest.mark.parametrize("build, sentences", TARGETS.values(), ids=TARGETS.keys())
def test_a_target_that_cannot_verify_trees_is_refused(build, sentences, count_forwards):
    target = build()
    # A draft that would fit by its sizes.
    sizes = target.config.get_text_config(decoder=True)
    draft = ConFuDraftModel(
        ConFuConfig(
            vocab_size=sizes.vocab_size,
            hidden_size=32,
            num_attention_heads=4,
            intermediate_size=64,
            target_num_hidden_layers=sizes.num_hidden_layers,
            num_soft_prompts=2,
        )
    )
    forwards = count_forwards(target)
    # Route B, as Transformers refuses some of them itself in route A.
    with pytest.raises(ValueError) as error:
        generate_b(target, draft)
    sentences = (sentences,) if isinstance(sentences, str) else sentences
    assert any(sentence in str(error.value) for sentence in sentences)
    assert not forwards


def test_images_are_refused(count_forwards):
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    target = from_config(
        "Llava",
        AutoModelForImageTextToText,
        text_config={"model_type": "llama", **LLAMA_SIZES},
        vision_config=vision,
        image_token_id=96,
        image_seq_length=4,
    )()
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


def test_a_draft_does_not_generate(llama):
    with pytest.raises(TypeError, match="A ConFu draft generates nothing by itself"):
        make_tiny_draft(llama).generate(PROMPT)


def test_stop_strings_need_a_tokenizer(llama):
    with pytest.raises(ValueError, match="`stop_strings` without `tokenizer`: pass the target's tokenizer too."):
        ConFuGenerate(make_tiny_draft(llama), stop_strings=["."])
