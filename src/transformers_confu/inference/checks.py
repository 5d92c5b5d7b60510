"""What cannot be decoded exactly, refused in one sentence before any work: targets, caches, calls."""

import inspect
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from .configuration_confu import STATIC_ROPE_TYPES, ConFuConfig
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
    if getattr(target, "_is_stateful", False):
        raise ValueError(
            f"{name} is stateful: it cannot return to an earlier state when a guess is refused, so no assisted "
            "generation works with it. Use a model with a key/value cache."
        )
    implementation = target_config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"{name} uses `attn_implementation='{implementation}'`, which cannot take the mask of a tree; load it "
            "with 'sdpa' or 'eager'."
        )
    layer_types = getattr(target_config, "layer_types", None) or []
    if unusual := sorted(set(layer_types) - {"full_attention"}):
        raise ValueError(
            f"{name} has layers of type {', '.join(unusual)}, whose cache cannot hold a tree; ConFu needs a target "
            "with full attention in every layer."
        )
    if not layer_types and getattr(target_config, "sliding_window", None) is not None:
        raise ValueError(
            f"{name} has `sliding_window={target_config.sliding_window}`, and a sliding cache cannot hold a tree; "
            "ConFu needs full attention (`sliding_window=None`)."
        )
    if getattr(target_config, "attention_layers", None) is not None:
        raise ValueError(
            f"{name} masks attention by the order of rows, whatever mask it is given, and the rows of a tree are in "
            "no such order; ConFu needs a target that follows the mask."
        )
    if getattr(target_config, "alibi", False):
        raise ValueError(
            f"{name} counts rows for its positions (`alibi=True`), and branches of a tree share positions; ConFu "
            "needs a target that follows `position_ids`."
        )
    rope = getattr(target_config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)  # some have one entry for each type of layer
    if rope.get("rope_type", "default") not in STATIC_ROPE_TYPES:
        raise ValueError(
            f"{name} uses RoPE type '{rope['rope_type']}', whose frequencies change with the length of the forward, "
            f"so cached keys would differ from plain decoding; types that work are {', '.join(STATIC_ROPE_TYPES)}."
        )
    if "mrope_section" in rope:
        raise ValueError(f"{name} uses 3-D positions (mrope), which a draft tree has not; use a text-only target.")
    if getattr(target_config, "hidden_size_per_layer_input", None):
        raise ValueError(
            f"{name} looks token ids up in every layer (`hidden_size_per_layer_input`), and a contemplate row has no "
            "id; use a target that reads its input embeddings only."
        )
    width = getattr(target.get_input_embeddings(), "embedding_dim", target_config.hidden_size)
    if width != target_config.hidden_size:
        raise ValueError(
            f"{name} has embeddings of size {width} and hidden states of size {target_config.hidden_size}; ConFu "
            "needs a target where both are the same."
        )
    parameters = inspect.signature(target.forward).parameters
    if missing := [p for p in ("inputs_embeds", "position_ids", "cache") if p not in parameters]:
        raise ValueError(f"{name}.forward takes no {', '.join(f'`{p}`' for p in missing)}, which a draft tree needs.")
    if getattr(target, "_tp_size", None) not in (None, 1):
        raise ValueError(
            f"{name} is loaded with tensor parallelism over {target._tp_size} processes, where every process would "
            "need the same tree; load it with `device_map` instead."
        )
    if config.rotate_soft_prompts and config.num_soft_prompts:
        KeyRotation(target)
    check_prompt_learning(getattr(target.prepare_inputs_for_generation, "__self__", target))
    adapters = getattr(target, "peft_config", None) or {}
    if any(getattr(adapter, "alora_invocation_tokens", None) for adapter in adapters.values()):
        raise ValueError(
            f"{name} has an activated LoRA (`alora_invocation_tokens`), which peft applies to the last rows of a "
            "forward, and those of a tree are not the text's last tokens; use a LoRA without it."
        )
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


def check_prompt_learning(target: torch.nn.Module) -> None:
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
            f"are for {ours[0]} of size {ours[1]}; use the target that the draft was made for."
        )


def check_cache(cache: Any, config: ConFuConfig) -> None:
    r"""
    Refuse a cache whose rows cannot be moved and dropped one by one.

    The type of each layer must be `DynamicLayer` itself: its subclasses store rows quantised, offloaded or windowed.
    """
    if isinstance(cache, DynamicCache) and not cache.offloading:
        layer_types = {type(layer) for layer in cache.layers}
        if layer_types <= {DynamicLayer}:
            for layer in cache.layers:
                if layer.get_seq_length() == 0:
                    continue
                keys, values = ((states.shape[1], states.shape[3]) for states in (layer.keys, layer.values))
                check_cached_heads(keys, values, config)
            return
        found = ", ".join(sorted(layer_type.__name__ for layer_type in layer_types - {DynamicLayer}))
        found = f"a {type(cache).__name__} with layers of type {found}"
    else:
        found = f"{'an offloaded' if getattr(cache, 'offloading', False) else 'a'} {type(cache).__name__}"
    raise ValueError(
        f"ConFu decoding needs a plain, non-offloaded DynamicCache of full-attention layers, got {found}; leave "
        "`cache_implementation` and `cache` unset, or pass `DynamicCache()`."
    )


SUPPORTED_MODEL_KWARGS = {
    "attention_mask",
    "position_ids",
    "cache",
    "use_cache",
    "inputs_embeds",
    "logits_to_keep",
    "output_attentions",
    "output_hidden_states",
}


def check_call(
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
    # Transformers gives models of text and images an empty dictionary where there are no images.
    present = {name for name, value in model_kwargs.items() if value is not None and value != {}}
    if foreign := sorted(present - SUPPORTED_MODEL_KWARGS):
        raise ValueError(
            f"A ConFu draft cannot pass {', '.join(f'`{name}`' for name in foreign)} on to the target's tree forward; "
            "it works with text inputs (`input_ids` or `inputs_embeds`, `attention_mask`, `position_ids`)."
        )
    if model_kwargs.get("position_ids") is None or model_kwargs["position_ids"].ndim != 2:
        shape = None if model_kwargs.get("position_ids") is None else tuple(model_kwargs["position_ids"].shape)
        raise ValueError(f"ConFu needs `position_ids` of shape (batch, length), got {shape}; use a text-only target.")
