"""What cannot be decoded exactly, refused in one sentence before any work: targets, caches, calls, weights of drafts.

What these checks do not know by name, the self-check finds by computing; see `self_check.py`.
"""

import inspect
import weakref
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import (
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
    StaticLayer,
)

from .cached_rows import cache_windows, filled_layers, layer_windows, layers_with_attention
from .configuration_confu import STATIC_TARGET_ROPE_TYPES, ConFuConfig, rope_of
from .recurrent_layers import recurrent_layers, recurrent_mixers
from .soft_prompts import KeyRotation


def check_target(target: PreTrainedModel, config: ConFuConfig) -> None:
    r"""
    Refuse a target that tree decoding with contemplate rows cannot serve, or that the draft was not made for.

    Raises:
        ValueError: in one sentence, what was found, why it cannot work, and what does.
    """
    name = type(target).__name__
    target_config = target.config.get_text_config(decoder=True)
    if target.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder model; ConFu drafts for decoder-only models.")
    _check_attention(name, target, target_config)
    _check_positions(name, target_config)
    _check_inputs(name, target, target_config)
    if getattr(target, "_tp_size", None) not in (None, 1):
        raise ValueError(
            f"{name} is loaded with tensor parallelism over {target._tp_size} processes, where every process would "
            "need the same tree; load it with `device_map` instead."
        )
    if config.rotate_soft_prompts and config.num_soft_prompts:
        KeyRotation(target)
    _check_adapters(name, target)
    for field, ours in (
        ("vocab_size", config.vocab_size),
        ("hidden_size", config.target_hidden_size),
        ("num_hidden_layers", config.target_num_hidden_layers),
    ):
        if getattr(target_config, field) != ours:
            raise ValueError(
                f"The draft was made for a target with `{field}={ours}`, but {name} has "
                f"{getattr(target_config, field)}; load the target named in the draft's card, or train a draft for "
                "this one."
            )


def _check_attention(name: str, target: PreTrainedModel, target_config: PreTrainedConfig) -> None:
    """Every row must see what a mask says, all of it, and nothing else; and its keys must lie in a plain cache."""
    implementation = target_config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"{name} uses `attn_implementation='{implementation}'`, which cannot take the mask of a tree; load it "
            "with 'sdpa' or 'eager'."
        )
    layer_types = getattr(target_config, "layer_types", None) or []
    if unusual := sorted(set(layer_types) - SERVED_LAYERS):
        raise ValueError(
            f"{name} has layers of type {', '.join(unusual)}, whose cache cannot hold a tree; ConFu needs a target "
            "with full or sliding-window attention, or with recurrent layers beside them."
        )
    layer_windows(target_config)
    _check_recurrent_layers(name, target)
    if getattr(target_config, "attention_layers", None) is not None:
        raise ValueError(
            f"{name} masks attention by the order of rows, whatever mask it is given, and the rows of a tree are in "
            "no such order; ConFu needs a target that follows the mask."
        )
    if getattr(target_config, "n_recurrent_loops", 1) > 1:
        raise ValueError(
            f"{name} runs through layers several times (`n_recurrent_loops={target_config.n_recurrent_loops}`), and "
            "what it caches is not what the rows of one forward see of each other; use a target without loops."
        )


SERVED_LAYERS = {"full_attention", "sliding_attention", "linear_attention", "conv", "hybrid", "moe", "mlp"}


def _check_recurrent_layers(name: str, target: PreTrainedModel) -> None:
    """States must lie in the cache, each of one module that can go through a tree; and some layer must hold rows."""
    cache = DynamicCache(config=target.config)
    recurrent = recurrent_layers(cache)
    if getattr(target, "_is_stateful", False) and not recurrent:
        raise ValueError(
            f"{name} keeps its state elsewhere than in a cache, and cannot return to an earlier one when a guess is "
            "refused; use a model with a key/value cache."
        )
    if recurrent and not layers_with_attention(target.config):
        raise ValueError(
            f"{name} has recurrent layers alone; ConFu needs a target with attention in some layers, whose cache "
            "tells how long the text is."
        )
    if recurrent and recurrent.keys() != recurrent_mixers(target).keys():
        raise ValueError(
            f"{name} has recurrent layers of a kind that ConFu does not know, in which the state of a tree's node "
            "could not be told from another's; use plain `generate`."
        )


def _check_positions(name: str, target_config: PreTrainedConfig) -> None:
    """Branches of a tree share positions, and cached keys keep theirs."""
    if getattr(target_config, "alibi", False):
        raise ValueError(
            f"{name} counts rows for its positions (`alibi=True`), and branches of a tree share positions; ConFu "
            "needs a target that follows `position_ids`."
        )
    if getattr(target_config, "attn_temperature_tuning", False) and not all(
        getattr(target_config, "no_rope_layers", None) or [True]
    ):
        raise ValueError(
            f"{name} scales queries by the number of rows before them (`attn_temperature_tuning`), and branches of a "
            "tree share positions; ConFu needs a target that follows `position_ids`."
        )
    for kind in ("full_attention", "sliding_attention"):
        rope_type = rope_of(target_config, kind).get("rope_type", "default")
        if rope_type not in STATIC_TARGET_ROPE_TYPES:
            raise ValueError(
                f"{name} uses RoPE type '{rope_type}', whose frequencies change with the length of the forward, "
                f"so cached keys would differ from plain decoding; types that work are "
                f"{', '.join(STATIC_TARGET_ROPE_TYPES)}."
            )


def _check_inputs(name: str, target: PreTrainedModel, target_config: PreTrainedConfig) -> None:
    """A contemplate row has no token id, only an embedding."""
    has_layer_inputs = getattr(target_config, "hidden_size_per_layer_input", None)
    if has_layer_inputs and not hasattr(target.get_decoder(), "get_per_layer_inputs"):
        raise ValueError(
            f"{name} looks token ids up in every layer (`hidden_size_per_layer_input`), not in the way of Gemma 3n "
            "and 4 (`get_per_layer_inputs`), and a contemplate row has no id; use a target that reads its input "
            "embeddings only."
        )
    width = getattr(target.get_input_embeddings(), "embedding_dim", target_config.hidden_size)
    if width != target_config.hidden_size:
        raise ValueError(
            f"{name} has embeddings of size {width} and hidden states of size {target_config.hidden_size}; ConFu "
            "needs a target where both are the same."
        )
    parameters = inspect.signature(target.forward).parameters
    if "input_ids" not in parameters and any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
        return  # a wrapper that passes on whatever it is given; the self-check sees whether it does
    if missing := [p for p in ("inputs_embeds", "position_ids", "cache") if p not in parameters]:
        missing_names = ", ".join(f"`{p}`" for p in missing)
        if "forward" in vars(target):
            raise ValueError(
                f"The `forward` that was put in the place of {name}'s own takes no {missing_names}, which a draft "
                "tree needs; let it take `**kwargs` and pass them on."
            )
        raise ValueError(f"{name}.forward takes no {missing_names}, which a draft tree needs.")


def _check_adapters(name: str, target: PreTrainedModel) -> None:
    check_prompt_learning(getattr(target.prepare_inputs_for_generation, "__self__", target))
    adapters = getattr(target, "peft_config", None) or {}
    if any(getattr(adapter, "alora_invocation_tokens", None) for adapter in adapters.values()):
        raise ValueError(
            f"{name} has an activated LoRA (`alora_invocation_tokens`), which peft applies to the last rows of a "
            "forward, and those of a tree are not the text's last tokens; use a LoRA without it."
        )


def check_evaluation_mode(target: PreTrainedModel) -> None:
    """Refuse a target whose forwards are random: dropout would fall on a tree's rows otherwise than on a text's."""
    training = [module for module in target.modules() if module.training]
    if not training:
        return
    rates = {}
    if dropout := max((module.p for module in training if isinstance(module, nn.Dropout)), default=0):
        rates["Dropout"] = dropout
    # Attention's dropout and a router's noise are no modules, but entries of the configuration.
    options = vars(target.config.get_text_config(decoder=True)).items()
    rates |= {
        option: value
        for option, value in options
        if isinstance(value, float) and value > 0 and any(part in option for part in ("drop", "jitter"))
    }
    if rates:
        found = ", ".join(f"`{option}={rate}`" for option, rate in rates.items())
        raise ValueError(
            f"{type(target).__name__} is in training mode with {found}, so that its text is random; call "
            "`target.eval()` first."
        )


def check_prompt_learning(target: nn.Module) -> None:
    """ValueError for a peft model with virtual tokens of its own."""
    if getattr(getattr(target, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            f"{type(target).__name__} has an active peft prompt-learning adapter, whose virtual tokens shift every "
            "position; LoRA and other adapters of weights work."
        )


def check_cached_heads(keys: tuple[int, int], values: tuple[int, int], config: ConFuConfig) -> None:
    """Refuse a target whose cached keys or values have another number of heads, or size of each, than the draft's."""
    ours = (config.target_num_key_value_heads, config.target_head_dim)
    if keys != ours or values != ours:
        of_values = "" if keys == values else f", and values of {values[0]} heads of size {values[1]}"
        raise ValueError(
            f"The target caches {keys[0]} key/value heads of size {keys[1]}{of_values}, but the draft's soft prompts "
            f"are for {ours[0]} of size {ours[1]}; use the target that the draft was made for, or decode without "
            "soft prompts by `confu_contemplation=0`."
        )


SERVED_CACHES = {
    *(DynamicLayer, DynamicSlidingWindowLayer),
    *(LinearAttentionLayer, LinearAttentionAndFullAttentionLayer, DummyLayer),
}


def check_cache(cache: Any, config: ConFuConfig, target: PreTrainedModel, contemplates: bool = True) -> None:
    r"""
    Refuse a cache whose rows cannot be moved and dropped one by one, or into which the soft prompts do not fit.

    The type of each layer must be one of `SERVED_CACHES` itself, with a sliding window where the target has that
    window, and with a state where it has a recurrent layer: other subclasses store rows quantised, offloaded or
    indexed. A cache may be of a class of the user's, but only with the `update` of `Cache`, in whose place the rows of
    a round are stored. Soft prompts need a place in it only if the call `contemplates`. A static cache of full
    attention alone is copied, see `fixed_cache`.
    """
    found = f"{'an offloaded' if getattr(cache, 'offloading', False) else 'a'} {type(cache).__name__}"
    if isinstance(cache, (DynamicCache, StaticCache)) and not cache.offloading:
        is_static = isinstance(cache, StaticCache)
        foreign_layers = {type(layer) for layer in cache.layers} - ({StaticLayer} if is_static else SERVED_CACHES)
        windows = cache_windows(target.config)
        with_rows = [layer for layer in cache.layers if isinstance(layer, DynamicLayer | StaticLayer)]
        cached = [getattr(layer, "sliding_window", None) for layer in with_rows]
        if type(cache).update is not Cache.update or "update" in vars(cache):
            found = f"a {type(cache).__name__} with an `update` of its own"
        elif foreign_layers:
            found = (
                f"a {type(cache).__name__} with layers of type {', '.join(sorted(t.__name__ for t in foreign_layers))}"
            )
        elif is_static and any(windows):
            found = f"a StaticCache for layers with windows {_in_short(windows)}"
        elif recurrent_layers(cache).keys() != recurrent_mixers(target).keys():
            found = f"a {type(cache).__name__} without the target's recurrent layers"
        elif any(cached) and cached != windows:
            found = (
                f"a {type(cache).__name__} whose layers have windows {_in_short(cached)}, where those of the target "
                f"have {_in_short(windows)}"
            )
        else:
            _check_cached_layers(cache, config, len(windows), contemplates)
            return
    raise ValueError(
        "ConFu decoding needs a plain, non-offloaded DynamicCache that is like the target's layers, or a StaticCache "
        f"of full attention alone, got {found}; leave `cache_implementation` and `cache` unset, or pass "
        "`DynamicCache(config=target.config)`."
    )


def check_capacity(
    cache: StaticCache, generation_config: GenerationConfig, input_ids: torch.LongTensor, model_kwargs: dict[str, Any]
) -> None:
    """Refuse a static cache that is full before the text is as long as it may be."""
    new = generation_config.max_length - input_ids.shape[1] - 1  # the last token of a text is never cached
    capacity, needed = cache.get_max_length(), prompt_length(generation_config, input_ids, model_kwargs) + new
    if capacity < needed:
        raise ValueError(
            f"The static cache holds {capacity} tokens at most, but the text may need {needed}; make it larger "
            "(`max_cache_len`), or generate less (`max_new_tokens`)."
        )


def _in_short(windows: list[int | None]) -> str:
    """The different windows among those of the layers."""
    return ", ".join(dict.fromkeys(str(window) for window in windows))


def _check_cached_layers(cache: Cache, config: ConFuConfig, num_layers: int, contemplates: bool) -> None:
    """Compare the rows of a cache that has some with the target's layers that cache, `num_layers`, and with the
    draft's soft prompts, which become rows of it."""
    filled = [layer for layer in filled_layers(cache) if layer.get_seq_length() > 0]
    if filled and len(filled) != num_layers:
        raise ValueError(
            f"The target has {num_layers} layers that cache, but caches keys and values of {len(filled)}, as targets "
            "do that run through layers several times; ConFu needs a target that caches each layer once."
        )
    if not contemplates or config.num_soft_prompts == 0:
        return
    for layer in filled:
        keys, values = ((states.shape[1], states.shape[3]) for states in (layer.keys, layer.values))
        check_cached_heads(keys, values, config)


SUPPORTED_MODEL_KWARGS = {
    *("attention_mask", "position_ids", "cache", "use_cache", "inputs_embeds", "logits_to_keep"),
    *("output_attentions", "output_hidden_states"),
}


def check_call(
    config: ConFuConfig,
    generation_config: GenerationConfig,
    input_ids: torch.LongTensor,
    synced_gpus: bool,
    model_kwargs: dict[str, Any],
) -> None:
    """Refuse what the round loop cannot do, with the kind of error that Transformers gives."""
    if not model_kwargs.get("use_cache") or model_kwargs.get("cache") is None:
        raise ValueError("assisted generation with a ConFu draft requires `use_cache=True`")
    if generation_config.num_beams > 1:
        raise ValueError(
            f"`num_beams` is {generation_config.num_beams}; a ConFu draft assists greedy search and sampling, so it "
            "has to be 1."
        )
    if generation_config.num_return_sequences > 1:
        raise ValueError(
            f"num_return_sequences has to be 1 when doing assisted generate, but is "
            f"{generation_config.num_return_sequences}."
        )
    if input_ids.shape[0] > 1:
        raise ValueError(f"assisted generate is only supported for batch_size = 1, got {input_ids.shape[0]}")
    if synced_gpus:
        raise ValueError(
            "`synced_gpus=True` keeps processes in step forward by forward, but ConFu's rounds differ in number "
            "between them; set it to False and give each process a whole target."
        )
    if generation_config.assistant_ensemble_weight is not None:
        raise ValueError(
            "`assistant_ensemble_weight` mixes the draft's distribution into the text; ConFu keeps the target's own. "
            "Leave it unset."
        )
    for name in ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp"):
        if value := getattr(generation_config, name, None):
            raise ValueError(
                f"`{name}={value}` asks for another source of guesses than the draft that is given; set it to None, "
                "or give no draft."
            )
    chunk_size = generation_config.prefill_chunk_size
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"`prefill_chunk_size` is {chunk_size}; it must be at least 1, or None for no chunks.")
    # Transformers gives models of text and images an empty dictionary where there are no images.
    present = {name for name, value in model_kwargs.items() if value is not None and value != {}}
    if foreign := sorted(present - SUPPORTED_MODEL_KWARGS):
        raise ValueError(
            f"A ConFu draft cannot pass {', '.join(f'`{name}`' for name in foreign)} on to the target's tree forward; "
            "it works with text inputs (`input_ids` or `inputs_embeds`, `attention_mask`, `position_ids`)."
        )
    logits_to_keep = model_kwargs.get("logits_to_keep")
    if logits_to_keep is not None and (isinstance(logits_to_keep, torch.Tensor) or logits_to_keep < 0):
        raise ValueError(
            f"`logits_to_keep` is {logits_to_keep}; decoding reads the last row's logits of every forward, so it must "
            "be a number of last rows, or unset."
        )
    if model_kwargs.get("inputs_embeds") is not None and config.has_own_embeddings:
        raise ValueError(
            f"This draft embeds tokens itself (hidden_size {config.hidden_size}, target {config.target_hidden_size}) "
            "and cannot read `inputs_embeds`; pass `input_ids`."
        )
    _check_lengths(generation_config, input_ids, model_kwargs)


def prompt_length(
    generation_config: GenerationConfig, input_ids: torch.LongTensor, model_kwargs: dict[str, Any]
) -> int:
    """Tokens of the prompt, as the mask says: cached ones too, which a call need not give again."""
    if (mask := model_kwargs.get("attention_mask")) is not None:
        return mask.shape[1]
    inputs_embeds = model_kwargs.get("inputs_embeds")
    # Transformers drops a mask that hides nothing, but notes its length.
    return getattr(generation_config, "_mask_length", (input_ids if inputs_embeds is None else inputs_embeds).shape[1])


def _check_lengths(
    generation_config: GenerationConfig, input_ids: torch.LongTensor, model_kwargs: dict[str, Any]
) -> None:
    """Ids or embeddings, mask, positions and cache must belong to one text."""
    cached = model_kwargs["cache"].get_seq_length()
    inputs_embeds = model_kwargs.get("inputs_embeds")
    given = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
    mask = model_kwargs.get("attention_mask")
    if mask is not None and mask.shape[0] != 1:
        raise ValueError(f"`attention_mask` has {mask.shape[0]} rows, but the input is one text; it needs one row.")
    mask_length = prompt_length(generation_config, input_ids, model_kwargs)
    # A continued text comes as the whole of it, or as the new ids with a mask that covers the cached ones too.
    only_new_ids = inputs_embeds is None and cached > 0 and mask_length == cached + given
    if mask_length != given and not only_new_ids:
        raise ValueError(
            f"`attention_mask` covers {mask_length} tokens, but the inputs are {given}"
            + (f" and the cache holds {cached}" if cached else "")
            + "; it needs a column for every token."
        )
    new = given if only_new_ids else given - cached
    if new < 1:
        raise ValueError(
            f"The cache holds {cached} tokens and the inputs add none; the newest token must not be cached. Pass the "
            "whole text, or the new ids with an `attention_mask` that also covers the cached ones."
            if cached
            else "The inputs hold no token; pass at least one."
        )
    position_ids = model_kwargs.get("position_ids")
    shape = None if position_ids is None else tuple(position_ids.shape)
    if shape is None or len(shape) != 2:
        raise ValueError(
            f"ConFu needs `position_ids` of shape (batch, length), got {shape}; pass shape (1, {new}), and use plain "
            "`generate` for prompts whose images have positions of their own."
        )
    if shape[0] != 1 or shape[1] < new:
        raise ValueError(
            f"`position_ids` has shape {shape}, but the inputs add {new} tokens; it needs shape (1, {new})."
        )


_SOUND_CHANNELS: "weakref.WeakKeyDictionary[nn.Module, tuple]" = weakref.WeakKeyDictionary()
"""Future channels that were found finite, with what would change if their values or the target's precision did."""


def check_future_channel(channel: nn.Module, dtype: torch.dtype) -> None:
    r"""
    Refuse a draft whose soft prompts or embeddings are not finite where the target computes with them.

    A real row of the target sees no contemplate row and no soft prompt: their weights in its attention are 0. But
    0 times NaN or infinity is NaN, and the text would be lost.

    Args:
        channel ([`ConFuFutureChannel`]): The draft's future channel.
        dtype (`torch.dtype`): Precision of the target, in which large numbers of the draft may be infinite.
    """
    parameters = dict(channel.named_parameters())
    try:
        version = (dtype, *((id(parameter), parameter._version) for parameter in parameters.values()))
    except RuntimeError:  # tensors made in inference mode count no versions
        version = None
    if version is not None and _SOUND_CHANNELS.get(channel) == version:
        return
    for name, parameter in parameters.items():
        reaches_target = name in ("soft_prompts", "contemplate_token.experts")
        if not bool(parameter.isfinite().all()):
            raise ValueError(
                f"The draft's `future_channel.{name}` holds NaN or infinity; train or load the draft again, or decode "
                "without it by `confu_contemplation=0`."
            )
        if reaches_target and not bool(parameter.to(dtype).isfinite().all()):
            raise ValueError(
                f"The draft's `future_channel.{name}` holds {parameter.abs().max().item():.3g}, which is infinite in "
                f"the target's {dtype}; load the target in bfloat16 or float32, or decode without contemplation by "
                "`confu_contemplation=0`."
            )
    if version is not None:
        _SOUND_CHANNELS[channel] = version
