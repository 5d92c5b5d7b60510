"""What the parts of a round cost by themselves: the instrumented pass, apart from the timed answers."""

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
from ..inference.modeling_confu import ConFuDraftModel, ConFuFutureChannel
from ..inference.target import TargetRunner, crop
from .arms import Arm
from .machine import synchronise


CURVE_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
REPEATS = 15
INSTRUMENTED_TOKENS = 48


class Bench:
    r"""
    A target that has read a context, ready to verify trees.

    Args:
        target ([`PreTrainedModel`]), draft ([`ConFuDraftModel`]): The pair.
        context (`list[int]`): Token ids.
    """

    def __init__(self, target: PreTrainedModel, draft: ConFuDraftModel, context: list[int]):
        self.device = target.device
        self.runner = TargetRunner(target, draft.config, draft.future_channel)
        self.cache = DynamicCache(config=target.config)
        ids = torch.tensor([context], device=self.device)
        with torch.no_grad():
            outputs = target(
                input_ids=ids,
                cache=self.cache,
                use_cache=True,
                output_hidden_states=self.runner.recorded,
            )
            self.taps = self.runner.taps(outputs.hidden_states)[:, -1]
        self.context = ids[0]
        self.root_positions = torch.tensor([len(context)], device=self.device)
        self.visible = torch.ones(1, len(context), dtype=torch.bool, device=self.device)

    def tree(self, size: int) -> DraftTree:
        """A binary tree of tokens of the context; which tokens makes no difference to the time."""
        nodes = torch.arange(size, device=self.device)
        depths = (nodes + 1).log2()
        return DraftTree.from_parents(
            self.context[nodes % len(self.context)][None], ((nodes - 1) // 2).clamp(min=0)[None], -depths[None]
        )

    @torch.no_grad()
    def seconds(self, runner: TargetRunner, tree: DraftTree, nodes: torch.LongTensor | None) -> float:
        """Of one verification; the cache is put back."""
        length = len(self.context)
        synchronise(self.device)
        started = time.perf_counter()
        runner.verify(tree, nodes, self.taps, self.cache, self.root_positions, self.visible)
        synchronise(self.device)
        seconds = time.perf_counter() - started
        crop(self.cache, length)
        return seconds


def medians(calls: dict[str, Callable[[], float]], repeats: int = REPEATS) -> dict[str, float]:
    """Median seconds of each call; the calls take turns, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            taken = call()
            if repeat:
                seconds[name].append(taken)
    return {name: statistics.median(values) for name, values in seconds.items()}


def forward_curve(target: PreTrainedModel, draft: ConFuDraftModel, context: list[int]) -> list[tuple[int, float]]:
    """Rows of a tree -> median seconds of the target's forward over them."""
    bench = Bench(target, draft, context)
    trees = {rows: bench.tree(rows) for rows in CURVE_ROWS}
    taken = medians({str(rows): partial(bench.seconds, bench.runner, tree, None) for rows, tree in trees.items()})
    return [(rows, taken[str(rows)]) for rows in CURVE_ROWS]


class WithoutSlots:
    """A future channel whose contemplate rows read no soft prompts, to tell what those cost."""

    def __init__(self, channel: ConFuFutureChannel):
        self.contemplate_token = channel.contemplate_token
        self.soft_prompts = channel.soft_prompts
        self._slots = channel.slots

    def slots(self, layer_idx: int, like: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self._slots(layer_idx, like, *args)
        return keys[..., :0, :], values[..., :0, :]


def arm_cost(target: PreTrainedModel, draft: ConFuDraftModel, arm: Arm, context: list[int]) -> dict[str, Any]:
    r"""
    What contemplation adds to a round of an arm, in seconds, and the sizes of the parts that do it.

    Returns:
        `forward`: median seconds of the target's forward over the nodes, with contemplate rows, and with rows and
        slots. `per_round`: what rows, slots, the two mixtures of experts and the projections of f add; the last three
        are measured inside a real call of `generate`. `parameters`: of each part. `slot_bytes`: of the soft prompts.
    """
    bench = Bench(target, draft, context)
    config = copy.deepcopy(draft.config)
    config.num_soft_prompts = 0
    slotless = TargetRunner(target, config, WithoutSlots(draft.future_channel))
    tree = bench.tree(arm.tree_size)
    nodes = tree.contemplated_nodes(arm.contemplation)
    forward = medians(
        {
            "nodes": partial(bench.seconds, bench.runner, tree, None),
            "rows": partial(bench.seconds, slotless, tree, nodes),
            "slots": partial(bench.seconds, bench.runner, tree, nodes),
        }
    )
    channel = draft.future_channel
    projections = [channel.future_projection, *([channel.future_residual] if channel.future_residual else [])]
    modules = {
        "contemplate_experts": [channel.contemplate_token],
        "future_experts": [channel.future_token],
        "projections": projections,
    }
    knobs = {f"confu_{name}": getattr(arm, name) for name in ("tree_size", "depth", "branching", "contemplation")}
    options = {"max_new_tokens": INSTRUMENTED_TOKENS, "min_new_tokens": INSTRUMENTED_TOKENS, "do_sample": False}
    generation_config = confu_generation_config(target, **options, **knobs)
    with timed(modules, target.device) as inside:
        target.generate(bench.context[None], assistant_model=draft, generation_config=generation_config)
    per_round = {name: seconds / draft.last_statistics.rounds for name, seconds in inside.items()}
    return {
        "forward": forward,
        "per_round": {
            "rows": forward["rows"] - forward["nodes"] - per_round["contemplate_experts"],
            "slots": forward["slots"] - forward["rows"],
            **per_round,
        },
        "parameters": parameters(draft),
        "slot_bytes": channel.soft_prompts.numel() * next(target.parameters()).element_size(),
    }


@contextmanager
def timed(modules: Mapping[str, Iterable[nn.Module]], device: torch.device) -> Iterator[dict[str, float]]:
    """Within it, the seconds spent in the forwards of modules add up under their names."""
    seconds = dict.fromkeys(modules, 0.0)
    started: dict[nn.Module, float] = {}
    handles = []

    def before(module: nn.Module, inputs: Any) -> None:
        synchronise(device)
        started[module] = time.perf_counter()

    def after(name: str, module: nn.Module) -> None:
        synchronise(device)
        seconds[name] += time.perf_counter() - started[module]

    for name, members in modules.items():
        for module in members:
            handles.append(module.register_forward_pre_hook(before))
            handles.append(module.register_forward_hook(lambda m, i, o, name=name: after(name, m)))
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


def parameters(draft: ConFuDraftModel) -> dict[str, int]:
    """Parameters of the parts of a draft; the target's embeddings, which it may read, are not its own."""
    channel = draft.future_channel
    parts = {
        "soft prompts": channel.soft_prompts.numel(),
        "[con] experts and router": count(channel.contemplate_token),
        "[f] experts and router": count(channel.future_token),
        "projections of f": count(channel.future_projection) + count(channel.future_residual),
    }
    parts["EAGLE-3 core"] = count(draft) - sum(parts.values())
    return parts


def count(module: nn.Module | None) -> int:
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())
