"""What is measured apart from the timed answers: the target's forward by rows, and the mixtures of experts."""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..inference.knobs import confu_generation_config
from ..inference.measured_costs import measure_round_costs
from ..inference.modeling_confu import ConFuDraftModel
from ..inference.target import input_device
from .arms import Arm
from .machine import synchronise


INSTRUMENTED_TOKENS = 48


def forward_curve(target: PreTrainedModel, draft: ConFuDraftModel) -> list[tuple[int, float]]:
    """Rows of a tree -> seconds of the target's forward over them; automatic rounds decide by the same figures."""
    costs, _ = measure_round_costs(target, draft)
    return [
        (rows, steps * costs.step_seconds) for rows, steps in zip(costs.target_rows, costs.target_steps, strict=True)
    ]


def mixture_costs(target: PreTrainedModel, draft: ConFuDraftModel, arm: Arm, context: list[int]) -> dict[str, float]:
    """
    Seconds that the two mixtures of experts and the projections of f take in a round of an arm, measured inside a real
    call of `generate` behind a context (token ids).
    """
    channel = draft.future_channel
    modules = {
        "contemplate_experts": [channel.contemplate_token],
        "future_experts": [channel.future_token],
        "projections": [channel.future_projection, *([channel.future_residual] if channel.future_residual else [])],
    }
    options = {"max_new_tokens": INSTRUMENTED_TOKENS, "min_new_tokens": INSTRUMENTED_TOKENS, "do_sample": False}
    config = confu_generation_config(target, **options, **arm.knobs)
    ids = torch.tensor([context], device=input_device(target))
    with timed(modules, ids.device) as seconds:
        target.generate(ids, assistant_model=draft, generation_config=config)
    return {name: taken / draft.last_statistics.rounds for name, taken in seconds.items()}


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
