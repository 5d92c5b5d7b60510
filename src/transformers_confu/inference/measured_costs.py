"""Measures what rounds cost: forwards of the target over trees, levels of the draft."""

import math
from collections.abc import Callable

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import logging

from .cached_rows import crop
from .candidate_generator_confu import ConFuCandidateGenerator, log_softmax
from .draft_tree import DraftTree
from .grouped_attention import without_repeated_heads
from .growing_cache import let_grow
from .round_costs import DRAFT_ROWS, TARGET_ROWS, RoundCosts, in_steps, least_seconds
from .rounds import AutomaticRounds
from .target import TargetRunner, additive_mask, input_device


logger = logging.get_logger(__name__)

CONTEXT = 128
"""Cached rows behind which forwards are measured."""


@torch.no_grad()
@without_repeated_heads()
def measure_round_costs(target: PreTrainedModel, draft: PreTrainedModel) -> tuple[RoundCosts, bool]:
    r"""
    The costs of rounds of this target and draft, with the threads of now; and whether the machine was quiet.

    Takes about three seconds at most, or as long as ten single forwards of the target where those take longer. The
    text is of one token; neither model, nor torch's random state, is changed.
    """
    logger.info("Measuring once what rounds cost with this target and draft on this machine.")
    parts = _target_rounds(target, draft) | _draft_levels(target, draft)
    seconds, is_quiet = least_seconds(parts, input_device(target))
    step = seconds[f"target {TARGET_ROWS[0]}"]
    costs = RoundCosts(
        target_rows=TARGET_ROWS,
        target_steps=in_steps((seconds[f"target {rows}"] for rows in TARGET_ROWS), TARGET_ROWS, step),
        draft_rows=DRAFT_ROWS,
        draft_steps=in_steps((seconds[f"draft {rows}"] for rows in DRAFT_ROWS), [math.inf] * len(DRAFT_ROWS), step),
        step_seconds=step,
    )
    logger.info("Measured%s: %s.", "" if is_quiet else ", though the machine has other work", costs)
    return costs, is_quiet


def _target_rounds(target: PreTrainedModel, draft: PreTrainedModel) -> dict[str, Callable[[], None]]:
    """Verification of trees of so many nodes."""
    device = input_device(target)
    positions = getattr(target.config.get_text_config(decoder=True), "max_position_embeddings", None) or CONTEXT + 2
    length = max(min(CONTEXT, positions - 2), 1)
    runner = TargetRunner(target, draft.config, draft.future_channel)
    cache = DynamicCache(config=target.config)
    target(
        input_ids=torch.zeros(1, length, dtype=torch.long, device=device),
        cache=cache,
        use_cache=True,
        return_dict=True,
    )
    let_grow(cache)
    visible = torch.ones(1, length, dtype=torch.bool, device=draft.device)
    root_positions = torch.tensor([length], device=draft.device)
    routed_by = torch.zeros(1, draft.config.taps_size, device=draft.device, dtype=draft.dtype)

    def round_of(rows: int) -> Callable[[], None]:
        tokens = torch.zeros(1, rows, dtype=torch.long, device=draft.device)
        tree = DraftTree.from_parents(tokens, torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.float32))

        def run() -> None:
            runner.verify(tree, None, routed_by, cache, root_positions, visible)
            crop(cache, length)

        return run

    return {f"target {rows}": round_of(rows) for rows in TARGET_ROWS}


def _draft_levels(target: PreTrainedModel, draft: PreTrainedModel) -> dict[str, Callable[[], None]]:
    """Levels of so many nodes."""
    generator = ConFuCandidateGenerator(draft, target)
    device = draft.device
    cache = DynamicCache(config=draft.config)

    def level(rows: int, behind: int) -> None:
        token_ids = torch.zeros(1, rows, dtype=torch.long, device=device)
        output = draft(
            inputs_embeds=generator.embed(token_ids),
            features=torch.zeros(1, rows, draft.config.hidden_size, device=device, dtype=draft.dtype),
            position_ids=torch.full_like(token_ids, behind),
            attention_mask=additive_mask(
                torch.ones(1, rows, behind + rows, dtype=torch.bool, device=device), like=draft.norm.weight
            ),
            cache=cache,
        )
        log_softmax(output.logits).topk(min(AutomaticRounds.branching, draft.config.draft_vocab_size))

    def level_of(rows: int) -> Callable[[], None]:
        def run() -> None:
            level(rows, CONTEXT)
            crop(cache, CONTEXT)

        return run

    level(CONTEXT, behind=0)
    return {f"draft {rows}": level_of(rows) for rows in DRAFT_ROWS}
