"""The frozen target: made ready for training, read, and what it says that the draft shall foretell."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import ModelOutput

from ..inference.checks import check_prompt_learning
from ..inference.modeling_confu import ConFuDraftModel
from ..inference.target import TargetRunner, can_name_logits
from .anchors import Anchors
from .batch import TokenBatch, gather_rows
from .chunked_loss import rows_per_chunk


def freeze(target: nn.Module) -> PreTrainedModel:
    """The target in eval mode, without gradients of its own; of a peft model the base model with its adapters on."""
    if hasattr(target, "get_base_model"):
        check_prompt_learning(target)  # which the base model alone would not show
        target = target.get_base_model()
    return target.eval().requires_grad_(False)


@torch.no_grad()
def read_batch(
    runner: TargetRunner,
    batch: TokenBatch,
    keep_logits: torch.BoolTensor,
    hidden_states: list[int],
    keep_cache: bool = False,
) -> ModelOutput:
    """
    The target's forward over a batch, with logits `(kept, V)` at the places `(B, T)` where they are wanted, the hidden
    states of these indices, and perhaps a cache.
    """
    target = runner.target
    keeps_logits = can_name_logits(target)
    with torch.autocast(device_type=target.device.type, enabled=False):
        outputs = target(
            input_ids=batch.input_ids,
            # Padding is on the right, where no real row sees it, and causal masking alone is cheaper.
            attention_mask=None if bool(batch.attention_mask.all()) else batch.attention_mask,
            position_ids=batch.position_ids,
            cache=DynamicCache() if keep_cache else None,  # of all rows, also where layers have windows
            use_cache=keep_cache,
            output_hidden_states=sorted(hidden_states),
            **runner.asked_of_all,
            **({"logits_to_keep": keep_logits} if keeps_logits else {}),
        )
    if not keeps_logits:
        outputs.logits = outputs.logits[keep_logits.to(outputs.logits.device)]
    return outputs


@dataclass
class Teaching:
    """
    What the target says about a batch: at position j, what token j + 1 should be. The M positions that teach some
    draft row are numbered through the batch, row by row.
    """

    taps: torch.Tensor  # (B, T, taps_size)
    probabilities: torch.Tensor  # (M, Vd): its distribution within the draft vocabulary, each row summing to 1
    out_of_vocabulary_mass: torch.Tensor  # (M,): its probability of all other tokens
    entropies: torch.Tensor  # (M,): within the draft vocabulary; what cross-entropy has over KL divergence
    best_tokens: torch.LongTensor  # (M,): its likeliest token of all
    futures: torch.Tensor | None = None  # (B, K, F): what comes of contemplation at the anchors


def teach(draft: ConFuDraftModel, runner: TargetRunner, batch: TokenBatch, anchors: Anchors | None) -> Teaching:
    """
    What the target, in its own dtype, says about a batch that it reads now.

    With anchors, gradients pass through it to soft prompts and `[con]`, from the contemplate rows only.
    """
    outputs = read_batch(
        runner,
        batch,
        keep_logits=batch.teaching_positions,
        hidden_states=draft.config.target_hidden_state_indices,
        keep_cache=anchors is not None,
    )
    taps, logits = runner.taps(outputs.hidden_states), outputs.logits
    draft_logits = logits[:, draft.draft_token_ids.to(logits.device)]
    teaching = teach_within(draft, taps, draft_logits, *summarize(logits))
    if anchors is not None:
        teaching.futures = contemplate(runner, batch, taps, outputs.cache, anchors)
    return teaching


@torch.no_grad()
def teach_within(
    draft: ConFuDraftModel,
    taps: torch.Tensor,
    draft_logits: torch.Tensor,
    best_tokens: torch.LongTensor,
    normalizers: torch.Tensor,
) -> Teaching:
    """From the target's logits of the draft vocabulary alone `(M, Vd)`, and what `summarize` says of the whole."""
    draft_logits = draft_logits.to(draft.device, torch.promote_types(draft.dtype, torch.float32))
    within = draft_logits.logsumexp(dim=-1)
    probabilities = draft_logits.softmax(dim=-1)
    return Teaching(
        taps=taps,
        probabilities=probabilities,
        entropies=within - (probabilities * draft_logits).sum(dim=-1),
        out_of_vocabulary_mass=-torch.expm1((within - normalizers.to(within)).clamp(max=0)),
        best_tokens=best_tokens.to(draft.device),
    )


@torch.no_grad()
def summarize(logits: torch.Tensor) -> tuple[torch.LongTensor, torch.Tensor]:
    """Likeliest token and log of the sum of exponentials of scores `(rows, V)`, both `(rows,)`; the latter float32."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    # `max` and not `argmax`, which is three times slower in bfloat16 on a CPU.
    chunks = logits.split(rows_per_chunk(logits.device))
    best_tokens = [chunk.max(dim=-1).indices for chunk in chunks]
    normalizers = [chunk.to(dtype).logsumexp(dim=-1) for chunk in chunks]
    return torch.cat(best_tokens), torch.cat(normalizers)


def contemplate(
    runner: TargetRunner, batch: TokenBatch, taps: torch.Tensor, cache: DynamicCache, anchors: Anchors
) -> torch.Tensor:
    """Future predictions at the anchors `(B, K, F)`, behind texts that are cached."""
    with torch.autocast(device_type=taps.device.type, enabled=False):
        return runner.contemplate(cache, *contemplate_rows(batch, taps, anchors))


def contemplate_rows(batch: TokenBatch, taps: torch.Tensor, anchors: Anchors) -> tuple[torch.Tensor, ...]:
    """What [`TargetRunner`] asks about the contemplate rows at anchors, behind a cache that holds the batch."""
    return (
        gather_rows(taps, anchors.routed_by),
        batch.position_ids.gather(1, anchors.positions) + 1,
        batch.position_ids.gather(1, anchors.routed_by) + 1,
        batch.sees(anchors.positions),
    )
