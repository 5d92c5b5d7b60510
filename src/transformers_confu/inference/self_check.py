"""Whether a target computes a tree as it computes text, proved by a small tree once for every target and draft.

Names of families cannot tell all: a target may be patched, hooked, or newer than this code. So before the first call a
tree of five nodes with contemplate rows is compared with what the same target says one token at a time.
"""

import copy
import warnings
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from .cached_rows import filled_layers
from .checks import check_cache
from .draft_tree import DraftTree
from .growing_cache import let_grow
from .target import TargetRunner, input_device


# Largest difference of a node's scores, relative to their spread, that rounding explains. In a trained model a wrong
# mask or wrong positions change scores by a good part of their spread.
ROUNDING = {torch.float64: 1e-5, torch.float32: 5e-4}
HALF_ROUNDING = 0.15

_PROVED: "weakref.WeakKeyDictionary[nn.Module, Any]" = weakref.WeakKeyDictionary()
"""Target -> draft -> the circumstances in which they were proved; see `_circumstances`."""


@torch.no_grad()
def prove_target(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    contemplates: bool,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> bool:
    r"""
    Compare a small tree with plain decoding of its paths, unless this target and draft have passed before.

    Costs four plain forwards of two short texts and one over ten rows. The random state and the caller's cache stay
    as they are. Forward hooks of the target run for these forwards as for all others.

    Args:
        target ([`PreTrainedModel`]): The target.
        draft ([`ConFuDraftModel`]): The draft.
        contemplates (`bool`): Whether the call has contemplate rows.
        autocast: Makes a context for the target's forwards.

    Returns:
        Whether anything was computed.

    Raises:
        ValueError: what differs, or that the target cannot compute a tree at all.
    """
    proved = _PROVED.setdefault(target, weakref.WeakKeyDictionary()).setdefault(draft, set())
    if _circumstances(target, contemplates, autocast) in proved:
        return False
    devices = sorted({p.device.index for p in target.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        _prove(target, draft, contemplates, autocast)
    # Asked anew, as the first forward that records hidden states leaves hooks of Transformers on the target.
    proved.add(_circumstances(target, contemplates, autocast))
    return True


def _circumstances(target: PreTrainedModel, contemplates: bool, autocast: Any) -> tuple:
    """What may change between two calls and make a proof void: hooks, another `forward`, another attention."""
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in target.modules())
    implementation = target.config.get_text_config(decoder=True)._attn_implementation
    return contemplates, hooks, id(vars(target).get("forward")), implementation, str(autocast)


def _prove(target: PreTrainedModel, draft: PreTrainedModel, contemplates: bool, autocast: Any) -> None:
    name = type(target).__name__
    runner = TargetRunner(target, draft.config, draft.future_channel, autocast=autocast)
    # Prefix, root and two branches of two tokens, which end in the same one and so differ by their ancestors alone.
    *prefix, root, left, right, leaf = _ordinary_tokens(target.config, count=8)
    texts = torch.tensor([[*prefix, root, left, leaf], [*prefix, root, right, leaf]], device=input_device(target))
    plain, cache, taps = _decode_plainly(target, runner, texts, prompt_length=len(prefix))
    check_cache(cache, draft.config, target, contemplates)
    cache.reorder_cache(torch.zeros(1, dtype=torch.long))  # the first text alone; the prompt is the same in both

    tree = DraftTree.from_parents(
        torch.tensor([[root, left, right, leaf, leaf]], device=taps.device),
        torch.tensor([[0, 0, 0, 1, 2]], device=taps.device),
        torch.zeros(1, 5, device=taps.device),
    )

    def verify(nodes: torch.LongTensor | None) -> torch.Tensor:
        root_position = torch.tensor([len(prefix)], device=taps.device)
        visible = torch.ones(1, len(prefix), dtype=torch.bool, device=taps.device)
        written = copy.deepcopy(cache)
        let_grow(written)
        try:
            verified = runner.verify(tree, nodes, taps, written, root_position, visible)
        except torch.OutOfMemoryError:
            raise
        except (IndexError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{name} cannot compute a tree: {type(error).__name__}: {error}. ConFu needs a target that takes a 4D "
                "mask, `position_ids` and `inputs_embeds`; use plain `generate`."
            ) from error
        return verified.outputs.logits[0, : tree.size]

    scores = verify(torch.arange(5, device=taps.device)[None] if contemplates else None)
    if contemplates and not bool(scores.isfinite().any(dim=-1).all()):
        # Contemplate rows overflowed. The decoding loop meets that by leaving them out, and so does this.
        scores = verify(None)
    _compare(name, plain, scores, _precision(target, plain, cache), _quantised_activations(target))


def _decode_plainly(
    target: PreTrainedModel, runner: TargetRunner, texts: torch.LongTensor, prompt_length: int
) -> tuple[torch.Tensor, DynamicCache, torch.Tensor]:
    """
    What plain `generate` computes if it writes these texts `(2, length)`, each by a forward of one token.

    Returns:
        Logits `(5, V)` of root, both nodes of depth 1 and both of depth 2; the cache as it was after the prompt; taps
        `(1, taps_size)` of the token before the root.
    """
    config = target.config.get_text_config(decoder=True)
    cache = DynamicCache(config=config)
    positions = torch.arange(texts.shape[1], device=texts.device).expand(2, -1)

    def forward(length: int, new: int) -> Any:
        inputs = target.prepare_inputs_for_generation(
            texts[:, :length],
            next_sequence_length=new,
            is_first_iteration=new > 1,
            cache=cache,
            attention_mask=None,
            position_ids=positions[:, length - new : length],
            use_cache=True,
            output_hidden_states=runner.recorded,
        )
        return runner.forward(**inputs, return_dict=True)

    taps = runner.taps(forward(prompt_length, prompt_length).hidden_states)[:1, -1]
    prompt_cache = copy.deepcopy(cache)
    logits = [forward(length, 1).logits[:, -1] for length in range(prompt_length + 1, texts.shape[1] + 1)]
    logits[0] = logits[0][:1]  # of the root, which both texts have
    return torch.cat(logits), prompt_cache, taps


def _compare(
    name: str, plain: torch.Tensor, scores: torch.Tensor, precision: torch.dtype, quantised_activations: str | None
) -> None:
    """Logits `(5, V)` of both ways. In half precision a few may be far off, where a router of experts is in doubt."""
    plain, scores = plain.double(), scores.to(plain.device).double()
    finite = plain.isfinite() & scores.isfinite()
    if not bool(finite.any(dim=-1).all()):
        return  # the target itself overflows on this text: nothing can be said
    spread = (plain - plain.where(finite, 0).mean(dim=-1, keepdim=True)).where(finite, 0).norm(dim=-1)
    errors = (plain - scores).where(finite, 0).norm(dim=-1) / spread.clamp(min=torch.finfo(torch.float32).tiny)
    if quantised_activations is not None:
        warnings.warn(
            f"{name} has quantised activations ({quantised_activations}), whose scales depend on all rows of a "
            "forward: text may part from that of plain `generate`, more often than in half precision.",
            stacklevel=2,
        )
        return
    tolerance = ROUNDING.get(precision, HALF_ROUNDING)
    error = errors.max() if precision in ROUNDING else errors.median()
    if error > tolerance:
        nodes = ("the root", "its first child", "its second child", "the first leaf", "the second leaf")
        wrong = ", ".join(node for node, error in zip(nodes, errors, strict=True) if error > tolerance)
        raise ValueError(
            f"{name} scores the tokens of a tree otherwise than the same texts token by token: {wrong} differ, by up "
            f"to {errors.max().item():.1%} of the scores' spread, where rounding in {precision} explains "
            f"{tolerance:.3%}. Its rows depend on more than `attention_mask` and `position_ids` say (on the order or "
            "number of rows, or by a hook), so that no tree can be verified; use plain `generate`."
        )


def _precision(target: PreTrainedModel, logits: torch.Tensor, cache: DynamicCache) -> torch.dtype:
    """The lowest precision in which the target computes, autocast included."""
    if logits.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return torch.bfloat16  # or TF32, which rounds less coarsely
    dtypes = [logits.dtype, filled_layers(cache)[-1].keys.dtype, target.dtype]
    return min((dtype for dtype in dtypes if dtype.is_floating_point), key=lambda dtype: dtype.itemsize)


def _quantised_activations(target: PreTrainedModel) -> str | None:
    """The kind of layer or weight by which a target rounds its activations to few bits, by their common range."""
    for module in target.modules():
        kind = type(module)
        if kind.__module__.startswith("torch.ao.nn.quantized.dynamic") or kind.__name__ == "Linear8bitLt":
            return f"{kind.__module__.split('.')[0]} {kind.__name__}"
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and type(weight).__module__.startswith("torchao"):
            if "Activation" in type(weight).__name__ or getattr(weight, "act_quant_kwargs", None) is not None:
                return f"torchao {type(weight).__name__}"
    return None


def _ordinary_tokens(config: PreTrainedConfig, count: int) -> list[int]:
    """Token ids, distinct if there are enough, that a configuration gives no special meaning."""
    special: set[int] = set()
    for part in (config, config.get_text_config(decoder=True)):
        for name, value in vars(part).items():
            if name.endswith(("token_id", "token_index")):
                special.update(value if isinstance(value, list) else [value])
    vocab_size = config.get_text_config(decoder=True).vocab_size
    ordinary = [token for token in range(vocab_size) if token not in special]
    return [ordinary[len(ordinary) * number // (count + 1) % len(ordinary)] for number in range(1, count + 1)]
