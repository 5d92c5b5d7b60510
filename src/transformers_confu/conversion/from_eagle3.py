"""EAGLE-3 drafts of other libraries -> ConFu drafts."""

import logging
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser, PreTrainedConfig, PreTrainedModel

from ..common.files import read_json, share
from ..common.loading import dtype_named, load_target_config
from ..common.option_files import option
from ..common.sentences import some
from ..common.vocabulary_map import check_vocabulary_map, marks_of
from ..inference.configuration_confu import ConFuConfig
from ..inference.modeling_confu import ConFuDraftModel
from .checkpoints import fetch, read_target_embeddings, read_weights, require_new
from .dialects import read_settings


logger = logging.getLogger(__name__)


def convert_eagle3(
    source: str | Path,
    target: str | Path | PreTrainedConfig | PreTrainedModel,
    *,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **overrides: Any,
) -> ConFuDraftModel:
    r"""
    A ConFu draft whose EAGLE-3 mode computes what an EAGLE-3 draft computes.

    The forms of SafeAILab, SGLang and SpecForge, of vLLM's speculators and of DeepSpec are told apart by their config,
    see `dialects.py`. The future channel is new and untrained, so the draft decodes in EAGLE-3 mode
    (`confu_contemplation=0` in its generation config) until it is trained.

    ```python
    >>> draft = convert_eagle3("path/or/repository", target="meta-llama/Llama-3.1-8B-Instruct")
    >>> draft.save_pretrained("my-confu-draft")
    ```

    Args:
        source: Folder or Hub id of the draft: safetensors, sharded or not, or PyTorch files without code.
        target: The target that it was trained for: a model, a folder or Hub id, or just a configuration. It gives the
            sizes and special tokens. Of a folder or repository only the file with the embeddings is read, and only if
            the draft brings a table of the target's width: a copy of the target's is left out, any other is kept.
        dtype: Of the result; the source's by default.
        revision: Branch, tag or commit of `source` on the Hub.
        trust_remote_code: Whether the target's configuration may run code that comes with it.
        overrides: Fields of [`ConFuConfig`]: sizes of the future channel, or what the source's config leaves open or
            says wrongly, such as `target_hidden_state_indices`, `norm_output` or `norm_before_residual`.

    Raises:
        ValueError: the files are damaged or hold more than tensors; the config contradicts itself, the weights or the
            target; weights are missing, unexpected or of another shape; or the draft computes something that a ConFu
            draft cannot.
    """
    folder = fetch(source, revision)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json; a checkpoint has one.")
    source_config = read_json(folder / "config.json")
    weights = _core_names(read_weights(folder))
    target_config = load_target_config(target, trust_remote_code).get_text_config(decoder=True)
    settings = read_settings(source_config, weights, target_config, overrides)
    _check_taps(weights, settings["target_hidden_state_indices"], target_config.hidden_size)
    _check_draft_vocabulary(weights, settings["draft_vocab_size"], target_config.vocab_size)
    if "embed_tokens.weight" in weights and settings["hidden_size"] == target_config.hidden_size:
        settings["has_own_embeddings"] = _has_own_embeddings(weights, target, target_config)

    try:
        config = ConFuConfig.from_target(target_config, **settings)
    except StrictDataclassError as error:
        raise ValueError(f"The draft cannot be a ConFu draft: {error.__cause__ or error}") from error
    dtype = dtype or _dtype_of(weights)
    draft = ConFuDraftModel._from_config(config, dtype=dtype)
    _load(weights, draft)
    draft.generation_config.confu_contemplation = 0
    return draft.eval()


MAPS = {"d2t", "t2d"}  # of the draft's vocabulary to the target's and back

# Names of SafeAILab and of SGLang's first EAGLE-3.1 drafts -> ours.
RENAMED = {
    "midlayer.": "layers.0.",
    "aux_norm_low.": "fc_norm.0.",
    "aux_norm_mid.": "fc_norm.1.",
    "aux_norm_high.": "fc_norm.2.",
}


def _core_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights by the names that the EAGLE-3 core has in a ConFu draft."""
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        prefix = next((prefix for prefix in RENAMED if name.startswith(prefix)), "")
        ours = RENAMED.get(prefix, "") + name.removeprefix(prefix)
        if ours in renamed:
            raise ValueError(f"The source holds {ours} twice, under two names.")
        renamed[ours] = tensor
    return renamed


def _check_taps(weights: dict[str, torch.Tensor], taps: list[int], target_hidden_size: int) -> None:
    """Settle the number of taps before anything else: no other message would name this cause."""
    fc = weights.get("fc.weight")
    if fc is not None and fc.ndim == 2 and fc.shape[1] != len(taps) * target_hidden_size:
        raise ValueError(
            f"`fc.weight` reads {fc.shape[1]} numbers, but the {len(taps)} taps {taps} of a target of width "
            f"{target_hidden_size} have {len(taps) * target_hidden_size}. If the source does not say which layers it "
            "taps, pass `target_hidden_state_indices`."
        )


def _check_draft_vocabulary(weights: dict[str, torch.Tensor], size: int, vocab_size: int) -> None:
    """Check d2t, EAGLE-3's offsets, against t2d, and complete what a source may leave out; changes `weights`."""
    offsets, mask = weights.get("d2t"), weights.get("t2d")
    if offsets is None:
        if size != vocab_size:
            raise ValueError(
                f"The source predicts {size} of {vocab_size} tokens, but has no `d2t`, which says which of them."
            )
        if mask is not None and not bool(mask.bool().all()):
            raise ValueError("The source has a `t2d` that leaves tokens out, but no `d2t`.")
        weights.pop("t2d", None)
        return
    if tuple(offsets.shape) != (size,):
        raise ValueError(f"`d2t` has the shape {tuple(offsets.shape)}, expected ({size},), the draft's vocabulary.")
    if mask is None:
        mask = marks_of(offsets, vocab_size)
    check_vocabulary_map(offsets, mask, vocab_size)
    weights["d2t"], weights["t2d"] = offsets.long(), mask.bool()


def _has_own_embeddings(
    weights: dict[str, torch.Tensor],
    target: str | Path | PreTrainedConfig | PreTrainedModel,
    target_config: PreTrainedConfig,
) -> bool:
    """Whether the source's table is worth keeping; a copy of the target's is taken out of `weights`."""
    ours = weights["embed_tokens.weight"]
    theirs = read_target_embeddings(target, target_config.vocab_size, target_config.hidden_size)
    if theirs is None:
        logger.warning(
            "The source brings an embedding table, and the target's cannot be read to compare: it is kept, which "
            "costs memory. Give the target's folder, id or model to leave a mere copy out."
        )
        return True
    if ours.shape == theirs.shape and torch.equal(ours, theirs.to(ours.dtype)):
        del weights["embed_tokens.weight"]
        return False
    return True


def _dtype_of(weights: dict[str, torch.Tensor]) -> torch.dtype:
    """The dtype that holds every weight without loss."""
    dtypes = [tensor.dtype for tensor in weights.values() if tensor.is_floating_point()]
    return reduce(torch.promote_types, dtypes) if dtypes else torch.get_default_dtype()


def _load(weights: dict[str, torch.Tensor], draft: ConFuDraftModel) -> None:
    """Fill a draft's EAGLE-3 core; no weight may be missing or left over, and none may have another shape."""
    if integers := [name for name, weight in weights.items() if name not in MAPS and not weight.is_floating_point()]:
        raise ValueError(f"The source's {some(integers)} are integers; convert the draft before it was quantised.")
    own = draft.state_dict()
    kept = {name: own[name] for name in own if name in MAPS or name.startswith("future_channel.")}
    try:
        draft.load_state_dict(kept | weights)
    except RuntimeError as error:
        hint = ""
        if not {"lm_head.weight", "layers.0.hidden_norm.weight"} & weights.keys():
            hint = " It looks like a draft of EAGLE-1 or 2, which cannot be converted."
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"The source's weights are not those of its config. {reason}.{hint}") from error


SWITCH = {"nargs": "?", "const": True}  # the name alone means true


@dataclass
class IntoOptions:
    """Options of `confu convert in`."""

    target: str = option("Folder or Hub id of the model that the draft was trained for.", ...)
    output: str = option("New folder for the ConFu draft.", ...)
    revision: str | None = option("Branch, tag or commit of the source on the Hub.")
    dtype: str | None = option("Dtype of the result, such as bfloat16; the source's if not given.")
    taps: list[int] | None = option(
        "Indices into the target's hidden_states (0 = embeddings, i = input of layer i) that the draft fuses, in "
        "place of what its config says."
    )
    norm_output: bool | None = option(
        "Whether features are fed back after the last norm, in place of what its config says.", **SWITCH
    )
    norm_before_residual: bool | None = option(
        "Whether the residual starts with the normalised feature, in place of what its config says.", **SWITCH
    )
    num_soft_prompts: int | None = option("Soft prompts of the new future channel.")
    rotate_soft_prompts: bool | None = option(
        "Whether they keep their distance to the text's end, by the target's RoPE.", **SWITCH
    )
    trust_remote_code: bool = option("Run the code that comes with the target's configuration; read it first.", False)


def main(argv: list[str] | None = None) -> None:
    """`confu convert in`: make a ConFu draft of an EAGLE-3 draft, and save it."""
    parser = HfArgumentParser(
        IntoOptions,
        allow_abbrev=False,
        description="Make a ConFu draft of an EAGLE-3 draft in the form of SafeAILab, SGLang, SpecForge, speculators "
        "or DeepSpec. It decodes as the source does; its future channel is new and wants training.",
    )
    parser.add_argument("source", help="folder or Hub id of the EAGLE-3 draft")
    options, positional = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    require_new(options.output)
    names = ("norm_output", "norm_before_residual", "num_soft_prompts", "rotate_soft_prompts")
    overrides = {name: getattr(options, name) for name in names} | {"target_hidden_state_indices": options.taps}
    draft = convert_eagle3(
        positional.source,
        options.target,
        dtype=None if options.dtype is None else dtype_named(options.dtype),
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        **{name: value for name, value in overrides.items() if value is not None},
    )
    draft.save_pretrained(options.output)
    share(options.output)
    print(
        f"{options.output}: taps {draft.config.target_hidden_state_indices}, draft vocabulary "
        f"{draft.config.draft_vocab_size} of {draft.config.vocab_size}. It decodes in EAGLE-3 mode; train its future "
        "channel next."
    )
