"""Measures what rounds cost: forwards of the target over trees, levels of the draft."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import logging

from .cached_rows import crop, lengthen
from .candidate_generator_confu import ConFuCandidateGenerator, log_chances
from .draft_tree import DraftTree
from .grouped_attention import without_repeated_heads
from .growing_cache import let_grow
from .round_costs import (
    CONTEXT,
    DRAFT_ROWS,
    DRAFT_ROWS_LONG,
    LONG_CONTEXT,
    TARGET_ROWS,
    TARGET_ROWS_LONG,
    RoundCosts,
    least_seconds,
)
from .rounds import AutomaticRounds
from .target import TargetRunner, additive_mask, input_device


logger = logging.get_logger(__name__)


@torch.no_grad()
@without_repeated_heads()
def measure_round_costs(target: PreTrainedModel, draft: PreTrainedModel) -> tuple[RoundCosts, bool]:
    r"""
    The costs of rounds of this target and draft, with the threads of now; and whether the machine was quiet.

    Takes about three seconds at most, or as long as twenty single forwards of the target where those take longer. The
    text is of one token, and a long one repeats the rows of a short one; neither model, nor torch's random state, is
    changed.
    """
    logger.info("Measuring once what rounds cost with this target and draft on this machine.")
    config = target.config.get_text_config(decoder=True)
    # The deepest leaf of the largest tree stands seven positions behind the text.
    most = max((getattr(config, "max_position_embeddings", None) or LONG_CONTEXT + 7) - 7, 1)
    parts: dict[Any, Callable[[], None]] = {}
    for context, target_rows, draft_rows in (
        (min(CONTEXT, most), TARGET_ROWS, DRAFT_ROWS),
        (min(LONG_CONTEXT, most), TARGET_ROWS_LONG, DRAFT_ROWS_LONG),
    ):
        rounds, levels = _target_rounds(target, draft, context), _draft_levels(target, draft, context)
        parts |= {(context, "target", rows): partial(rounds, rows) for rows in target_rows}
        parts |= {(context, "draft", rows): partial(levels, rows) for rows in draft_rows}
    seconds, is_quiet = least_seconds(parts, input_device(target))
    costs: RoundCosts | None = None
    for context in sorted({context for context, *_ in parts}, reverse=True):
        of_target, of_draft = (
            {rows: taken for (behind, what, rows), taken in seconds.items() if (behind, what) == (context, of)}
            for of in ("target", "draft")
        )
        costs = RoundCosts.of(of_target, of_draft, context=context, longer=costs)
    assert costs is not None
    logger.info("Measured%s: %s.", "" if is_quiet else ", though the machine has other work", costs)
    return costs, is_quiet


def _target_rounds(target: PreTrainedModel, draft: PreTrainedModel, context: int) -> Callable[[int], None]:
    """
    Verification of trees of so many nodes behind so many tokens. Every node has two children, so that a tree is about
    as deep as real ones of its size: recurrent layers take one step for each of its levels.
    """
    device = input_device(target)
    runner = TargetRunner(target, draft.config, draft.future_channel)
    cache = DynamicCache(config=target.config)
    target(
        input_ids=torch.zeros(1, min(context, CONTEXT), dtype=torch.long, device=device),
        cache=cache,
        use_cache=True,
        return_dict=True,
    )
    lengthen(cache, context)
    let_grow(cache)
    visible = torch.ones(1, context, dtype=torch.bool, device=draft.device)
    root_positions = torch.tensor([context], device=draft.device)
    routed_by = torch.zeros(1, draft.config.taps_size, device=draft.device, dtype=draft.dtype)

    def run(rows: int) -> None:
        tokens = torch.zeros(1, rows, dtype=torch.long, device=draft.device)
        parents = (torch.arange(rows, device=draft.device)[None] - 1).clamp(min=0) // 2
        tree = DraftTree.from_parents(tokens, parents, torch.zeros_like(tokens, dtype=torch.float32))
        runner.verify(tree, None, routed_by, cache, root_positions, visible)
        crop(cache, context)

    return run


def _draft_levels(target: PreTrainedModel, draft: PreTrainedModel, context: int) -> Callable[[int], None]:
    """Levels of so many nodes behind so many tokens."""
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
        log_chances(output.logits).topk(min(AutomaticRounds.branching, draft.config.draft_vocab_size))

    def run(rows: int) -> None:
        level(rows, context)
        crop(cache, context)

    level(min(context, CONTEXT), behind=0)
    lengthen(cache, context)
    let_grow(cache)
    return run
