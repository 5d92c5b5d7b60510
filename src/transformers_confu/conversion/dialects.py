r"""
What the config of an EAGLE-3 checkpoint means, in the terms of [`ConFuConfig`].

Three families write such configs, and each leaves out what the others hold for self-evident:

| | SafeAILab, SGLang, SpecForge ("flat") | vLLM speculators | DeepSpec |
|---|---|---|---|
| told by | none of the others' marks | `speculators_model_type` | `Qwen3Eagle3Model`, `target_layer_ids` |
| decoder layer | top level | `transformer_layer_config` | top level, a copy of the target's |
| taps | `eagle_config.eagle_aux_hidden_state_layer_ids`, outputs: +1 | top level, inputs: as they are | outputs: +1 |
| taps not given | 2, L//2, L-3 | 2, L//2, L-3 | error |
| `norm_before_residual` not given | False | True | False |

Sources: SafeAILab/EAGLE `model/cnets.py`, vllm-project/speculators `models/eagle3/config.py`, vllm-project/vllm
`models/llama_eagle3.py`, deepseek-ai/DeepSpec `modeling/eagle3/`. A checkpoint without d2t predicts every token.
"""

import logging
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..inference.configuration_confu import default_taps


logger = logging.getLogger(__name__)

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")

LAYER_IDS = "eagle_aux_hidden_state_layer_ids"


def dialect_of(config: dict[str, Any]) -> str:
    """`"flat"`, `"speculators"` or `"deepspec"`, by the marks that only one of them has."""
    if (method := config.get("speculators_model_type")) is not None:
        if method != "eagle3":
            raise ValueError(f"`speculators_model_type` is '{method}'; only drafts of 'eagle3' can be converted.")
        return "speculators"
    architectures = config.get("architectures") or []
    if "target_layer_ids" in config or "Qwen3Eagle3Model" in architectures:
        if architectures not in ([], ["Qwen3Eagle3Model"]):
            raise ValueError(
                f"`architectures` is {architectures}; of the drafts with `target_layer_ids`, only Qwen3Eagle3Model "
                "has the layer of an EAGLE-3 draft."
            )
        return "deepspec"
    return "flat"


def read_settings(
    config: dict[str, Any], weights: dict[str, torch.Tensor], target: PreTrainedConfig, overrides: dict[str, Any]
) -> dict[str, Any]:
    r"""
    Fields of [`ConFuConfig`] that a source's config settles, and its weights where the config is silent.

    Args:
        config: The source's `config.json`.
        weights: Its weights, with `layers.0.` for `midlayer.`.
        target ([`PreTrainedConfig`]): The target's, of the text model.
        overrides: Fields that the user settles; whatever the source says of them is not read.

    Raises:
        ValueError: the config contradicts itself, its weights or the target, or asks for what a ConFu draft has not.
    """
    dialect = dialect_of(config)
    layer = config.get("transformer_layer_config") if dialect == "speculators" else config
    if not isinstance(layer, dict):
        raise ValueError(f"`transformer_layer_config` is {layer!r}, expected the settings of the draft's layer.")
    _refuse_what_is_no_eagle3(config, layer)

    _must_agree("vocab_size", layer.get("vocab_size", target.vocab_size), target.vocab_size)
    _must_agree("hidden_size", config.get("target_hidden_size") or layer["hidden_size"], target.hidden_size)
    _must_agree(
        "num_hidden_layers", config.get("num_target_layers", target.num_hidden_layers), target.num_hidden_layers
    )

    settings = {
        name: layer[name]
        for name in ("hidden_size", "intermediate_size", "num_attention_heads")  # no default is safe
    }
    settings |= {
        "num_key_value_heads": layer.get("num_key_value_heads") or layer["num_attention_heads"],
        "head_dim": layer.get("head_dim") or layer["hidden_size"] // layer["num_attention_heads"],
        "hidden_act": layer.get("hidden_act", "silu"),
        "rms_norm_eps": layer.get("rms_norm_eps", 1e-6),
        "draft_vocab_size": config.get("draft_vocab_size") or len(weights.get("d2t", range(target.vocab_size))),
        "rope_parameters": read_rope(layer),
        # A draft's own number is often a training length that was never meant as a bound.
        "max_position_embeddings": max(
            layer.get("max_position_embeddings", 0), getattr(target, "max_position_embeddings", None) or 0
        ),
        "norm_before_residual": _flag(config, "norm_before_residual", default=dialect == "speculators"),
        "attention_bias": _flag_of_weights(layer, "attention_bias", "layers.0.self_attn.q_proj.bias" in weights),
        "mlp_bias": _flag_of_weights(layer, "mlp_bias", "layers.0.mlp.gate_proj.bias" in weights),
        "use_qk_norm": "layers.0.self_attn.q_norm.weight" in weights,
        "fc_norm": _flag_of_weights(config, "fc_norm", "fc_norm.0.weight" in weights),
        "norm_before_fc": _flag_of_weights(config, "norm_before_fc", "input_norm.weight" in weights),
    }
    if "norm_output" not in overrides:
        settings["norm_output"] = _flag(config, "norm_output", default=False)
        if settings["norm_output"] and dialect == "flat":
            logger.warning(
                "The source says `norm_output: true`, which is read as EAGLE-3.1: features are fed back after the "
                "last norm. SpecForge wrote it between May and September 2026 for drafts that feed them back before "
                "it. If the converted draft accepts next to nothing, convert again with `norm_output=False`."
            )
    if "target_hidden_state_indices" not in overrides:
        settings["target_hidden_state_indices"] = read_taps(config, dialect, target.num_hidden_layers)
    return settings | overrides


def _refuse_what_is_no_eagle3(config: dict[str, Any], layer: dict[str, Any]) -> None:
    missing = [name for name in ("hidden_size", "intermediate_size", "num_attention_heads") if name not in layer]
    if missing:
        raise ValueError(f"The source's config has no {', '.join(f'`{name}`' for name in missing)}.")
    if (model_type := layer.get("model_type", "llama")) not in LLAMA_LIKE:
        raise ValueError(
            f"The draft's layer is of `model_type` '{model_type}'; only layers like Llama's can be converted "
            f"({', '.join(LLAMA_LIKE)})."
        )
    if layer.get("num_hidden_layers", 1) != 1:
        raise ValueError(f"The draft has {layer['num_hidden_layers']} decoder layers; a ConFu draft has exactly 1.")
    if config.get("quantization_config") or config.get("compression_config"):
        raise ValueError("The draft is quantised; convert the one it was made from.")
    if _flag(config, "use_aux_hidden_state", default=True) is False:
        raise ValueError(
            "The draft has `use_aux_hidden_state: false`: it reads the target's last hidden state only, as EAGLE-1 "
            "and 2 do. Only EAGLE-3 drafts, which fuse several, can be converted."
        )
    if _flag(config, "parallel_drafting", default=False):
        raise ValueError(
            "The draft predicts several tokens at once (`parallel_drafting`), which a ConFu draft cannot."
        )
    if layer.get("logit_scale", 1.0) != 1.0:
        raise ValueError(f"The draft scales its logits by {layer['logit_scale']}, which a ConFu draft does not.")
    if set(layer.get("layer_types") or ["full_attention"]) != {"full_attention"}:
        raise ValueError(f"The draft's layer is of type {layer['layer_types']}; a ConFu draft has full attention.")


def _must_agree(field: str, of_source: int, of_target: int) -> None:
    if of_source != of_target:
        raise ValueError(
            f"The draft was made for a target with `{field}={of_source}`, but this one has {of_target}; give the "
            "target that the draft was trained on."
        )


def _flag(config: dict[str, Any], name: str, default: bool) -> bool:
    """A switch that may stand at the top level or in `eagle_config`."""
    found = {bool(place[name]) for place in (config, config.get("eagle_config") or {}) if place.get(name) is not None}
    if len(found) > 1:
        raise ValueError(f"The source's config says `{name}` both true and false, inside and outside `eagle_config`.")
    return found.pop() if found else default


def _flag_of_weights(config: dict[str, Any], name: str, has_weights: bool) -> bool:
    """A switch that has weights of its own, which settle it where the config is silent."""
    flag = _flag(config, name, default=has_weights)
    if flag != has_weights:
        raise ValueError(
            f"The source's config says `{name}: {str(flag).lower()}`, but its weights "
            f"{'include' if has_weights else 'lack'} what belongs to it."
        )
    return flag


def read_taps(config: dict[str, Any], dialect: str, num_layers: int) -> list[int]:
    """Indices into the target's `hidden_states`; 0 are the embeddings, i is the input of layer i."""
    hint = "; pass `target_hidden_state_indices` to settle it"
    if dialect == "deepspec":
        if not config.get("target_layer_ids"):
            raise ValueError(f"The source's config has no `target_layer_ids`{hint}.")
        taps = [index + 1 for index in config["target_layer_ids"]]
    else:
        nested = (config.get("eagle_config") or {}).get(LAYER_IDS)
        if nested is not None:
            nested = [index + 1 for index in nested]
        given = [taps for taps in (nested, config.get(LAYER_IDS)) if taps is not None]
        if len(given) == 2 and given[0] != given[1]:
            raise ValueError(
                f"`eagle_config` lists the layer outputs {[index - 1 for index in nested]}, which are the inputs of "
                f"layers {nested}, but `{LAYER_IDS}` lists the inputs of layers {config[LAYER_IDS]}{hint}."
            )
        taps = list(given[0]) if given else default_taps(num_layers)
    if sorted(set(taps)) != taps:
        raise ValueError(
            f"The source taps the inputs of layers {taps}, in this order; serving engines concatenate them in rising "
            f"order whatever the config says, so it is not known which the draft was trained for{hint}."
        )
    if not taps or taps[0] < 0 or taps[-1] > num_layers:
        raise ValueError(
            f"The source taps the inputs of layers {taps}, but the target has {num_layers} layers; give the target "
            "that the draft was trained on."
        )
    if taps[-1] == num_layers and dialect != "deepspec":
        raise ValueError(
            f"The source taps the output of the target's last layer, {num_layers - 1}. Serving engines take it before "
            "the final norm, where Transformers gives no access, so the draft would read other features than it was "
            "trained on."
        )
    return taps


def read_rope(layer: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters`, or the older `rope_theta` and `rope_scaling`, as the former."""
    rope = dict(layer.get("rope_parameters") or {})
    scaling = dict(layer.get("rope_scaling") or {})
    if "type" in scaling:
        scaling.setdefault("rope_type", scaling.pop("type"))
    old = scaling | ({} if layer.get("rope_theta") is None else {"rope_theta": layer["rope_theta"]})
    for name, value in old.items():
        if rope.setdefault(name, value) != value:
            raise ValueError(
                f"The source's config says `{name}` is {rope[name]} in `rope_parameters` and {value} beside it; "
                "correct the one that is wrong."
            )
    rope.setdefault("rope_type", "default")
    rope.setdefault("rope_theta", 10000.0)
    if rope.get("partial_rotary_factor", layer.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("The draft rotates a part of each head only (`partial_rotary_factor`); ConFu's rotates all.")
    if rope["rope_type"] in ("llama3", "yarn"):
        # Both would else be taken from the length of the converted draft, which may be raised to the target's.
        length = rope.setdefault("original_max_position_embeddings", layer.get("max_position_embeddings", 2048))
        rope.setdefault("factor", layer.get("max_position_embeddings", length) / length)
    return rope
