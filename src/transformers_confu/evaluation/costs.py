"""What the parts of a round cost by themselves: measured apart from the timed answers."""

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from ..inference.draft_tree import DraftTree
from ..inference.knobs import confu_generation_config
from ..inference.modeling_confu import ConFuDraftModel
from ..inference.target import TargetRunner, crop, input_device
from .arms import Arm
from .machine import synchronise


CURVE_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
REPEATS = 15
INSTRUMENTED_TOKENS = 48


def verification(
    target: PreTrainedModel, draft: ConFuDraftModel, context: list[int], num_nodes: int, num_rows: int
) -> Callable[[], float]:
    r"""
    A target that has read a context, ready to verify a binary tree again and again.

    Args:
        target, draft: The pair.
        context (`list[int]`): Token ids.
        num_nodes, num_rows (`int`): Nodes of the tree, and contemplate rows beside them.

    Returns:
        A function that runs the forward once and returns its seconds.
    """
    device = input_device(target)
    runner = TargetRunner(target, draft.config, draft.future_channel)
    cache = DynamicCache(config=target.config)
    ids = torch.tensor([context], device=device)
    with torch.no_grad():
        states = target(input_ids=ids, cache=cache, use_cache=True, output_hidden_states=runner.recorded).hidden_states
    taps = runner.taps(states)[:, -1]
    nodes = torch.arange(num_nodes, device=device)
    # Which tokens the tree holds makes no difference to the time.
    tree = DraftTree.from_parents(
        ids[:, nodes % len(context)], ((nodes - 1) // 2).clamp(min=0)[None], -(nodes + 1).log2()[None]
    )
    contemplated = tree.contemplated_nodes(num_rows) if num_rows else None
    root = torch.tensor([len(context)], device=device)
    visible = torch.ones(1, len(context), dtype=torch.bool, device=device)

    @torch.no_grad()
    def seconds() -> float:
        synchronise(device)
        started = time.perf_counter()
        runner.verify(tree, contemplated, taps, cache, root, visible)
        synchronise(device)
        taken = time.perf_counter() - started
        crop(cache, len(context))
        return taken

    return seconds


def medians(calls: Mapping[Any, Callable[[], float]], repeats: int | None = None) -> dict[Any, float]:
    """Median seconds of each call; the calls take turns, after one round that is not counted."""
    seconds: dict[Any, list[float]] = {name: [] for name in calls}
    for _ in range(1 + (repeats or REPEATS)):
        for name, call in calls.items():
            seconds[name].append(call())
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def forward_curve(target: PreTrainedModel, draft: ConFuDraftModel, context: list[int]) -> list[tuple[int, float]]:
    """Rows of a tree -> median seconds of the target's forward over them."""
    return list(medians({rows: verification(target, draft, context, rows, 0) for rows in CURVE_ROWS}).items())


def arm_cost(target: PreTrainedModel, draft: ConFuDraftModel, arm: Arm, context: list[int]) -> dict[str, Any]:
    r"""
    What contemplation adds to a round of an arm, and the sizes of the parts that do it.

    Returns:
        `per_round`: seconds that contemplate rows, soft-prompt slots, the two mixtures of experts and the projections
        of f add. The first two are differences of the target's forward, the others are measured inside a real call of
        `generate`. `parameters`: of each part of the draft. `slot_bytes`: of the soft prompts in the target's dtype.
    """
    bare = _without_soft_prompts(draft)
    make = partial(verification, target, context=context, num_nodes=arm.tree_size)
    forward = medians(
        {
            "nodes": make(draft=draft, num_rows=0),
            "rows": make(draft=bare, num_rows=arm.contemplation),
            "slots": make(draft=draft, num_rows=arm.contemplation),
        }
    )
    channel = draft.future_channel
    modules = {
        "contemplate_experts": [channel.contemplate_token],
        "future_experts": [channel.future_token],
        "projections": [channel.future_projection, *([channel.future_residual] if channel.future_residual else [])],
    }
    options = {"max_new_tokens": INSTRUMENTED_TOKENS, "min_new_tokens": INSTRUMENTED_TOKENS, "do_sample": False}
    config = confu_generation_config(target, **options, **arm.knobs)
    ids = torch.tensor([context], device=input_device(target))
    with timed(modules, ids.device) as inside:
        target.generate(ids, assistant_model=draft, generation_config=config)
    per_round = {name: seconds / draft.last_statistics.rounds for name, seconds in inside.items()}
    return {
        "per_round": {
            "rows": forward["rows"] - forward["nodes"] - per_round["contemplate_experts"],
            "slots": forward["slots"] - forward["rows"],
            **per_round,
        },
        "parameters": parameters(draft),
        "slot_bytes": channel.soft_prompts.numel() * target.dtype.itemsize,
    }


def _without_soft_prompts(draft: ConFuDraftModel) -> ConFuDraftModel:
    """A copy whose contemplate rows read no soft prompts, to tell what those cost."""
    bare = copy.deepcopy(draft)
    bare.config.num_soft_prompts = 0
    bare.future_channel.soft_prompts = nn.Parameter(draft.future_channel.soft_prompts[..., :0, :].detach())
    return bare


@contextmanager
def timed(modules: Mapping[str, Iterable[nn.Module]], device: torch.device) -> Iterator[dict[str, float]]:
    """Within it, the seconds spent in the forwards of modules add up under their names."""
    seconds = dict.fromkeys(modules, 0.0)
    started: dict[nn.Module, float] = {}
    handles = []

    def before(module: nn.Module, inputs: Any) -> None:
        synchronise(device)
        started[module] = time.perf_counter()

    def after(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        synchronise(device)
        seconds[name] += time.perf_counter() - started[module]

    for name, members in modules.items():
        for module in members:
            handles.append(module.register_forward_pre_hook(before))
            handles.append(module.register_forward_hook(partial(after, name)))
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


def parameters(draft: ConFuDraftModel) -> dict[str, int]:
    """Parameters of the parts of a draft; the target's embeddings, which it may read, are not its own."""

    def count(*modules: nn.Module | None) -> int:
        return sum(parameter.numel() for module in modules if module is not None for parameter in module.parameters())

    channel = draft.future_channel
    parts = {
        "soft prompts": channel.soft_prompts.numel(),
        "[con] experts and router": count(channel.contemplate_token),
        "[f] experts and router": count(channel.future_token),
        "projections of f": count(channel.future_projection, channel.future_residual),
    }
    return parts | {"EAGLE-3 core": count(draft) - sum(parts.values())}
