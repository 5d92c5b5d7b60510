"""Short hashes by which files that are gone on with know what they were made of."""

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel


def fingerprint_of_dataset(dataset: Dataset) -> str:
    """Hash of all ids and labels of a dataset, in order."""
    digest = hashlib.sha256()
    for batch in dataset.select_columns(["input_ids", "labels"]).with_format("numpy").iter(batch_size=1000):
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            digest.update(np.asarray([len(ids)]).tobytes() + ids.tobytes() + labels.tobytes())
    return digest.hexdigest()[:16]


def fingerprint_of_target(target: PreTrainedModel, dtype: torch.dtype | None = None) -> str:
    """
    Hash of a target's configuration and tensors, wherever it was loaded from; see [`fingerprint_of_module`].

    With `dtype` it is the hash of the target as rounded to it: with bf16, the same for the target in fp32 and bf16.
    """
    config = target.config
    # What is as by default does not count: another version of Transformers may know more options.
    default = config.default_config_fields()
    settings = {
        name: value
        for name, value in config.to_diff_dict().items()
        if name not in ("architectures", "dtype", "transformers_version")  # saving and loading set them
        and (name not in default or value != default[name])
    }
    content = json.dumps(settings, sort_keys=True, default=str) + fingerprint_of_module(target, dtype=dtype)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def fingerprint_of_module(module: nn.Module, prefixes: Sequence[str] = ("",), dtype: torch.dtype | None = None) -> str:
    """
    Hash of the parameters, and of the buffers that a checkpoint holds (weights, where they are quantised), by name.

    Of a large tensor every n-th value counts, some thousands in all. That finds what training or quantising changed,
    and may miss a change of single values. A tensor that is offloaded, or of a class of its own, counts by dtype and
    shape alone.
    """
    # Other buffers follow from the configuration, and differ by rounding from device to device.
    kept = module.state_dict().keys()
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in kept}
    tensors: dict[str, torch.Tensor] = {**dict(module.named_parameters()), **buffers}
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if not name.startswith(tuple(prefixes)):
            continue
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        digest.update(f"{name} {kind} {list(tensor.shape)}".encode())
        if not tensor.is_meta and not hasattr(tensor, "__tensor_flatten__"):
            flat = tensor.detach().flatten()
            # An odd step: one that divides the length of the rows would look at the same column of each.
            sample = flat[:: max(1, len(flat) // 4096) | 1]
            digest.update(sample.to(kind).cpu().double().numpy().tobytes())
    return digest.hexdigest()[:16]
