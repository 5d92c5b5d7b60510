"""A draft that starts from its target's own weights, which learns markedly faster than a random one."""

import logging

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ..inference.cached_rows import filled_layers
from ..inference.configuration_confu import ConFuConfig
from ..inference.modeling_confu import ConFuDraftModel
from ..inference.row_inputs import RowInputs
from ..inference.target import TargetRunner, input_device


logger = logging.getLogger(__name__)

PLAIN_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@torch.no_grad()
def warm_start(
    target: PreTrainedModel,
    draft_token_ids: torch.LongTensor,
    config: ConFuConfig | None = None,
    soft_prompt_ids: torch.LongTensor | None = None,
) -> ConFuDraftModel:
    r"""
    A float32 draft initialised from a target.

    Taken over where shapes allow: the final norm, the lm_head rows of the draft vocabulary, and the last layer's MLP,
    norms and attention, the latter for the half of the input that is the feature (queries and keys only if both models
    normalise them, or neither does); `fc` starts as the highest tap, and norms of taps at the taps' own sizes. What
    could not be taken over is logged.

    Args:
        draft_token_ids (`torch.LongTensor` of shape `(draft_vocab_size,)`): See [`build_draft_vocabulary`].
        config: Defaults to [`ConFuConfig.from_target`].
        soft_prompt_ids (`torch.LongTensor` of shape `(num_soft_prompts,)`, *optional*): A text whose keys and values
            in the target become the soft prompts; random ones without it.
    """
    config = config or ConFuConfig.from_target(target.config, draft_vocab_size=len(draft_token_ids))
    draft = ConFuDraftModel(config)
    draft.set_draft_vocabulary(draft_token_ids)
    draft_token_ids = draft.draft_token_ids

    backbone = target.get_decoder()
    # Of the list of layers, whatever it is called (`layers`, `h`, `blocks`).
    lists = (module for module in backbone.modules() if isinstance(module, nn.ModuleList))
    last = next((layers[-1] for layers in lists if len(layers) == config.target_num_hidden_layers), None)
    layer = draft.layers[0]
    # The draft's feature starts as the highest tap: the other taps come in as training finds use for them.
    nn.init.zeros_(draft.fc.weight)
    if config.hidden_size == config.target_hidden_size:
        nn.init.eye_(draft.fc.weight[:, -config.target_hidden_size :])
    else:
        nn.init.normal_(draft.fc.weight, std=config.taps_size**-0.5)

    if draft.fc_norm is not None:
        # At size 1 the feature would drown in what the target's last layer adds to it, whose weights follow below.
        for norm, size in zip(draft.fc_norm, _tap_sizes(target, draft), strict=True):
            norm.weight.fill_(size)

    feature_half = slice(config.hidden_size, 2 * config.hidden_size)
    lm_head = _weight(target.get_output_embeddings())
    pairs = [
        ("norm", draft.norm.weight, _weight(backbone, "norm")),
        ("lm_head", draft.lm_head.weight, None if lm_head is None else lm_head[draft_token_ids.to(lm_head.device)]),
        ("hidden_norm", layer.hidden_norm.weight, _weight(last, "input_layernorm")),
    ]
    names = ["post_attention_layernorm", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    # A norm behind queries and keys sets their size, so the target's projections are of no use without its norms: both
    # are taken over, or neither.
    normalised = getattr(getattr(last, "self_attn", None), "q_norm", None) is not None
    if normalised and config.use_qk_norm:
        names += ["self_attn.q_norm", "self_attn.k_norm"]
    pairs += [(name, layer.get_submodule(name).weight, _weight(last, name)) for name in names]
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        fits = name == "self_attn.v_proj" or normalised == config.use_qk_norm
        ours = layer.get_submodule(name).weight[:, feature_half]
        pairs.append((name, ours, _weight(last, name) if fits else None))
    left = []
    for name, ours, theirs in pairs:
        if theirs is None or ours.shape != theirs.shape:
            left.append(name)
        else:
            ours.copy_(theirs)
    if left:
        logger.warning(
            "Warm start: %s of the target have other shapes, other norms or no weights; left random.", ", ".join(left)
        )

    start_future_channel(draft, target, soft_prompt_ids)
    return draft


@torch.no_grad()
def start_future_channel(
    draft: ConFuDraftModel, target: PreTrainedModel, soft_prompt_ids: torch.LongTensor | None = None
) -> None:
    """Start a new future channel from its target, see [`warm_start`]; the draft's core stays as it is."""
    config, channel = draft.config, draft.future_channel
    if soft_prompt_ids is not None and config.num_soft_prompts > 0:
        if len(soft_prompt_ids) != config.num_soft_prompts:
            raise ValueError(
                f"`soft_prompt_ids` holds {len(soft_prompt_ids)} tokens; the draft has {config.num_soft_prompts} soft "
                "prompts, one for each."
            )
        # Position 0 of rotated soft prompts is that of a round's root; the text ends just in front of it.
        position_ids = torch.arange(len(soft_prompt_ids), device=target.device)[None]
        if config.rotate_soft_prompts:
            position_ids = position_ids - len(soft_prompt_ids)
        cache = DynamicCache(config=target.config)
        # All rows, also where layers have windows.
        cache.layers = [DynamicLayer() if getattr(layer, "is_sliding", False) else layer for layer in cache.layers]
        token_ids = soft_prompt_ids[None].to(target.device)
        target(input_ids=token_ids, position_ids=position_ids, cache=cache, use_cache=True)
        filled = filled_layers(cache)
        for states, layer in zip(channel.soft_prompts, cache.layers, strict=False):
            if layer in filled:  # soft prompts of layers that hold no keys of their own are never read
                states.copy_(torch.stack([layer.keys[0], layer.values[0]]))
    # `[con]` starts at the size of a real token's row, which differs between targets by orders of magnitude: Gemma
    # scales what it looks up. Every so many tokens tell.
    some_ids = torch.arange(0, config.vocab_size, -(-config.vocab_size // 1024), device=input_device(target))
    rows = RowInputs(target)(some_ids[None])["inputs_embeds"]
    channel.contemplate_token.experts.normal_(std=float(rows.float().std()))


def is_channel_untrained(draft: ConFuDraftModel) -> bool:
    """Whether the future channel is as conversion leaves it: switched off, and without effect on the residual."""
    residual = draft.future_channel.future_residual
    switched_off = getattr(draft.generation_config, "confu_contemplation", None) == 0
    return switched_off and (residual is None or not bool(residual.weight.any()))


def _weight(module: nn.Module | None, path: str = "") -> torch.Tensor | None:
    """
    Weight of the submodule at `path`, dequantised where it knows how (torchao); `None` where there is no plain one.

    Quantised modules have none, or a packed or scaled one (FP8); offloaded ones hold theirs on the meta device.
    """
    for name in path.split(".") if path else ():
        module = getattr(module, name, None)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):  # torch's own quantised layers have a method of this name
        return None
    if is_traceable_wrapper_subclass(weight) and type(weight).dequantize is not torch.Tensor.dequantize:
        weight = weight.dequantize()
    if weight.dtype not in PLAIN_DTYPES or weight.is_meta or is_traceable_wrapper_subclass(weight):
        return None
    if weight.ndim == 1 and "RMSNorm" in type(module).__name__:
        # Some families, such as Gemma, keep a norm's scale less 1; what the norm makes of ones tells.
        return weight + (module(torch.ones_like(weight)) - weight).mean().round()
    return weight


def _tap_sizes(target: PreTrainedModel, draft: ConFuDraftModel) -> list[float]:
    """Root mean square of each tap at a middling token, of any tokens: a text's are much the same."""
    token_ids = draft.draft_token_ids[:: -(-draft.config.draft_vocab_size // 64)].to(target.device)
    runner = TargetRunner(target, draft.config, draft.future_channel)
    outputs = target(input_ids=token_ids[None], output_hidden_states=True, use_cache=False, **runner.asked_of_all)
    taps = runner.taps(outputs.hidden_states)[0].unflatten(-1, (-1, draft.config.target_hidden_size))
    # The median, as a text's first token is often hundreds of times larger than the others.
    return taps.square().mean(dim=-1).sqrt().median(dim=0).values.tolist()
