"""The EAGLE-3 part of ConFu drafts -> checkpoints that other engines serve."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import save_file
from transformers import HfArgumentParser, PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from ..common.files import share
from ..common.loading import load_draft, load_target_config
from ..common.option_files import option
from ..common.sentences import some
from ..inference.configuration_confu import SPECIAL_TOKENS, ConFuConfig
from ..inference.knobs import ConFuKnobs
from ..inference.modeling_confu import ConFuDraftModel
from .checkpoints import read_target_embeddings, require_new
from .dialects import LAYER_IDS


logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("eagle3_card_template.md")


def export_eagle3(
    draft: ConFuDraftModel,
    folder: str | Path,
    format: Literal["sglang", "speculators"] = "sglang",
    target: str | Path | PreTrainedModel | None = None,
    trust_remote_code: bool = False,
) -> None:
    r"""
    Write the EAGLE-3 part of a draft in the form of another library. The future channel stays behind: what is written
    drafts as this draft does with `confu_contemplation=0` and without an `attention_window`, and its card says so.

    Args:
        draft ([`ConFuDraftModel`]): The draft.
        folder: Where to write; new or empty.
        format: `"sglang"` is the form of SafeAILab, SGLang and SpecForge, `"speculators"` that of vLLM's speculators.
        target: The draft's target: a model, a folder or a Hub id. speculators' form holds the target's embeddings and
            names it; without it only a draft with embeddings of its own can be written so.
        trust_remote_code: Whether the target's configuration may run code that comes with it.

    Raises:
        ValueError: the form cannot express what the draft computes, or the target does not fit.
        FileExistsError: `folder` holds files.
    """
    require_new(folder)
    config = draft.config
    if format not in ("sglang", "speculators"):
        raise ValueError(f"`format` is {format!r}; it must be 'sglang' or 'speculators'.")
    _refuse_what_cannot_be_written(config, format)
    weights = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in draft.state_dict().items()
        if not name.startswith("future_channel.")
    }
    if config.draft_vocab_size == config.vocab_size:
        # Every token is predicted; readers of both forms then expect no map.
        del weights["d2t"], weights["t2d"]
    if format == "sglang":
        weights = {
            f"midlayer.{name.removeprefix('layers.0.')}" if name.startswith("layers.0.") else name: tensor
            for name, tensor in weights.items()
        }
        written = _sglang_config(config, draft.dtype)
    else:
        if not config.has_own_embeddings:
            weights["embed_tokens.weight"] = _target_embeddings(draft, target)
        depth = getattr(draft.generation_config, "confu_depth", None) or ConFuKnobs.FIXED["depth"]
        architectures = []
        if isinstance(target, PreTrainedModel):
            architectures = [type(target).__name__]
        elif target is not None:
            architectures = load_target_config(target, trust_remote_code).architectures or []
        verifier = {"name_or_path": _name_of(target), "architectures": architectures}
        written = _speculators_config(config, draft.dtype, depth, verifier)

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
    (folder / CONFIG_NAME).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _card(format, _name_of(target)).save(folder / "README.md")
    share(folder)


def _refuse_what_cannot_be_written(config: ConFuConfig, format: str) -> None:
    unknown_to_sglang = ("use_qk_norm", "norm_before_residual", "attention_bias", "mlp_bias")
    if format == "sglang" and (names := [name for name in unknown_to_sglang if getattr(config, name)]):
        raise ValueError(f"The draft has {some(names)}, which SGLang does not know; use the form 'speculators'.")
    if format == "sglang" and config.has_own_embeddings and config.hidden_size == config.target_hidden_size:
        raise ValueError(
            "The draft has embeddings of its own (`has_own_embeddings`), but as wide as its target's, and SGLang "
            "would replace them by the target's. Use 'speculators'."
        )
    taps, layers = config.target_hidden_state_indices, config.target_num_hidden_layers
    if taps[0] == 0 or taps[-1] == layers:
        raise ValueError(
            f"The draft taps the hidden states {taps} of a target of {layers} layers; other engines give neither the "
            f"embeddings (0) nor the state after the final norm ({layers})."
        )


LAYER_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "max_position_embeddings"),
    *("attention_bias", "mlp_bias", "initializer_range", *SPECIAL_TOKENS),
)


def _layer_config(config: ConFuConfig, dtype: torch.dtype) -> dict[str, Any]:
    """
    What both forms say of the decoder layer. RoPE stands there twice: `rope_parameters` is what Transformers 5 reads,
    and knows no `rope_theta` beside it; `rope_theta` and `rope_scaling` are what Transformers 4 and SGLang read.
    """
    rope = dict(config.rope_parameters)
    scaling: dict[str, Any] | None = {name: value for name, value in rope.items() if name != "rope_theta"}
    if rope["rope_type"] == "default":
        scaling = None
    elif rope["rope_type"] == "linear":
        # SafeAILab's config class wants just these two, by these names, and the factor as a float.
        scaling = {"type": "linear", "factor": float(rope["factor"])}
    return {name: getattr(config, name) for name in LAYER_FIELDS} | {
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": scaling,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def _sglang_config(config: ConFuConfig, dtype: torch.dtype) -> dict[str, Any]:
    rope_type = config.rope_parameters["rope_type"]
    if rope_type not in ("default", "linear"):
        logger.warning(
            "The draft's RoPE is of type '%s'. SGLang and SpecForge read it; SafeAILab's own code knows only 'linear' "
            "and will refuse the folder.",
            rope_type,
        )
    written = _layer_config(config, dtype) | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "draft_vocab_size": config.draft_vocab_size,
        "eagle_config": {
            # This form counts outputs of layers: output i is hidden state i + 1.
            LAYER_IDS: [index - 1 for index in config.target_hidden_state_indices],
            "use_aux_hidden_state": True,
        },
    }
    if config.target_hidden_size != config.hidden_size:
        written["target_hidden_size"] = config.target_hidden_size
    return written | {name: True for name in ("fc_norm", "norm_before_fc", "norm_output") if getattr(config, name)}


def _speculators_config(
    config: ConFuConfig, dtype: torch.dtype, depth: int, verifier: dict[str, Any]
) -> dict[str, Any]:
    layer = _layer_config(config, dtype) | {"model_type": "qwen3" if config.use_qk_norm else "llama"}
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": depth,
                    "verifier_accept_k": 1,
                    "accept_tolerance": 0.0,
                }
            ],
            "verifier": verifier,
        },
        "transformer_layer_config": layer,
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size,
        LAYER_IDS: config.target_hidden_state_indices,
        "norm_before_residual": config.norm_before_residual,
        "norm_before_fc": config.norm_before_fc,
        "fc_norm": config.fc_norm,
        "norm_output": config.norm_output,
        "embed_requires_grad": False,
        "tie_word_embeddings": False,
        "torch_dtype": layer["torch_dtype"],
    }


def _target_embeddings(draft: ConFuDraftModel, target: str | Path | PreTrainedModel | None) -> torch.Tensor:
    config = draft.config
    if target is None:
        raise ValueError(
            "speculators' form holds the target's embeddings, and this draft has none of its own; pass `target`."
        )
    table = read_target_embeddings(target, config.vocab_size, config.target_hidden_size)
    if table is None:
        raise ValueError(
            f"No embedding table of {config.vocab_size} x {config.target_hidden_size} was found in the target "
            f"{_name_of(target)}; pass the draft's own target, loaded on this machine if it is quantised."
        )
    return table.to(draft.dtype).contiguous()


def _name_of(target: str | Path | PreTrainedModel | None) -> str | None:
    if isinstance(target, PreTrainedModel):
        return target.config._name_or_path or None
    return None if target is None else str(target)


def _card(format: str, target_name: str | None) -> ModelCard:
    if target_name is not None and (target_name.count("/") != 1 or Path(target_name).exists()):
        target_name = None  # a folder of this machine means nothing to the card's readers
    data = ModelCardData(
        base_model=target_name,
        tags=["speculative-decoding", "draft-model", "eagle3", format],
        pipeline_tag="text-generation",
    )
    return ModelCard.from_template(data, template_path=str(TEMPLATE), target_name=target_name, format=format)


@dataclass
class OutOptions:
    """Options of `confu convert out`."""

    output: str = option("New folder for the EAGLE-3 draft.", ...)
    format: Literal["sglang", "speculators"] = option("Whose form; speculators is vLLM's.", ...)
    target: str | None = option("Folder or Hub id of the draft's target; needed for speculators.")
    trust_remote_code: bool = option("Run the code that comes with the target's configuration; read it first.", False)


def main(argv: list[str] | None = None) -> None:
    """`confu convert out`: write the EAGLE-3 part of a ConFu draft."""
    parser = HfArgumentParser(
        OutOptions,
        allow_abbrev=False,
        description="Write the EAGLE-3 part of a ConFu draft, without its future channel, for SGLang or vLLM.",
    )
    parser.add_argument("draft", help="folder or Hub id of the ConFu draft")
    options, positional = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    export_eagle3(
        load_draft(positional.draft), options.output, options.format, options.target, options.trust_remote_code
    )
    print(f"{options.output}: an EAGLE-3 draft, without the future channel")
