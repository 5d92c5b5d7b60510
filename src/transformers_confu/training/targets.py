"""The frozen target of a training run: loading it, taking it out of a peft model, sharding it over processes."""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..common.demo_target import demo_target_path
from ..common.loading import load_target
from ..inference.checks import check_prompt_learning


def load_frozen_target(
    name: str, dtype: str, device: torch.device | str, device_map: dict[str, Any] | str | None = None
) -> PreTrainedModel:
    """
    Load a target by name; a folder or Hub id of a peft adapter loads its base model too.

    Args:
        name: A folder, a Hub id, or `"demo"`.
        dtype: Name of a torch dtype, such as `"bfloat16"`.
        device: Where the target goes, unless there is a `device_map`.
        device_map: As of `from_pretrained`.
    """
    if device_map is None:
        return load_target(name, dtype, device)[0]
    path = demo_target_path() if name == "demo" else name
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map=device_map).eval()


def freeze(target: nn.Module) -> PreTrainedModel:
    """The target in eval mode, without gradients of its own; of a peft model the base model with its adapters on."""
    if hasattr(target, "get_base_model"):
        check_prompt_learning(target)  # which the base model alone would not show
        target = target.get_base_model()
    return target.eval().requires_grad_(False)


def shard(target: PreTrainedModel, device: torch.device) -> None:
    """
    Shard the target's layers over all processes, in place (FSDP2).

    Each layer is gathered when a forward or a backward reaches it. What lies outside of the layers (embeddings, final
    norm, head) stays whole on every process: training calls the embeddings by themselves. All processes must then run
    equally many forwards, which `ConFuTrainer` sees to.
    """
    # Imported here: not in every build of torch.
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if isinstance(target, FSDPModule):  # by an earlier stage of the same command
        return
    layers = [module for module in target.modules() if type(module).__name__ in (target._no_split_modules or ())]
    if not layers:
        raise ValueError(
            f"{type(target).__name__} names no layers that may be sharded (`_no_split_modules`); load it with "
            "`target_device_map` instead."
        )
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    target.to(device)
    outside = set(target.parameters()).difference(*(layer.parameters() for layer in layers))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(target, mesh=mesh, ignored_params=outside)
