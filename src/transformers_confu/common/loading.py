"""Targets and drafts by the names that a command line gives them, and the options that say how a target is loaded."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..inference.modeling_confu import ConFuDraftModel
from ..inference.target import input_device
from .demo_target import demo_target_path
from .int8_weights import int8_pays, use_int8_weights
from .option_files import json_option, option
from .weight_layout import packing_pays, use_packed_weights


DEMO_DRAFT = "transformers-confu/confu-smollm2-135m-instruct"


def dtype_named(name: str | torch.dtype) -> torch.dtype:
    """The torch dtype of a name, such as `"bfloat16"`, or the given one; ValueError if there is none of that name."""
    dtype = name if isinstance(name, torch.dtype) else getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype is {name!r}, expected the name of a torch dtype such as bfloat16.")
    return dtype


def default_device() -> str:
    """`"cuda"` if there is such a GPU, else `"cpu"`. Other accelerators are untested; ask for them with `--device`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device: torch.device | str | None = None) -> str:
    """`"bfloat16"` if the device computes in it, else `"float32"`: an emulated bf16 takes many times as long."""
    kind = torch.device(device or default_device()).type
    native = True
    if kind == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif kind == "cpu":
        # AVX-512 and AMX of x86, and what ARM calls it. Older versions of torch cannot tell.
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return "bfloat16" if native else "float32"


@dataclass
class TargetOptions:
    """How a command loads its target: options that all commands share. Their parsers read it as a dataclass."""

    device: str | None = option("Where to run, such as cuda:1; a GPU if there is one, else the CPU.")
    device_map: str | None = option(
        "Spread a large target over devices, memory and disk: auto, balanced, or JSON of module to device; in place "
        "of `device`."
    )
    trust_remote_code: bool = option("Run the code that comes with the target's checkpoint; read it first.", False)

    def __post_init__(self):
        if self.device is not None and self.device_map is not None:
            raise ValueError(f"`device` is {self.device} and `device_map` {self.device_map}; give one of the two.")

    def load(self, name: str, dtype: str | torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The target of that name and its tokenizer, see [`load_target`]."""
        return load_target(name, dtype, self.device, self.device_map, self.trust_remote_code)


def load_target(
    name: str,
    dtype: str | torch.dtype,
    device: torch.device | str | None = None,
    device_map: dict[str, Any] | str | None = None,
    trust_remote_code: bool = False,
    few_rows: bool = True,
    **model_kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Load a target in eval mode, and its tokenizer.

    Args:
        name: `"demo"`, a folder (of a model, also quantised, or of a peft adapter), or a Hub id.
        dtype, device: Of the weights; `None` is [`default_device`].
        device_map: As of `from_pretrained`, also as JSON, for a target that is split or offloaded; in place of
            `device`.
        few_rows: Whether it will see few rows at a time, as in decoding: where this CPU gains by it, fp32 weights are
            then packed for that. Not for training, in which all processes must have them alike.
        trust_remote_code, model_kwargs: As of `from_pretrained`.
    """
    dtype = dtype_named(dtype)
    path = checkpoint(name)
    if isinstance(device_map, str) and device_map.startswith("{"):
        device_map = json_option("device_map", device_map)
    if device_map is None and torch.device(device or default_device()).type != "cpu":
        # Straight to its device: a quantised model refuses `.to`.
        device_map = {"": str(device or default_device())}
    with refusals(name, "target"):
        target = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code, **model_kwargs
        )
    if few_rows and few_rows_are_slow(target):
        megabytes = use_packed_weights(target) / 2**20
        print(
            f"{name}: multiplies by packed copies of its weights, {megabytes:.0f} MiB, which is faster on this CPU.",
            file=sys.stderr,
        )
    return target.eval(), load_tokenizer(path, trust_remote_code)


def few_rows_are_slow(model: PreTrainedModel) -> bool:
    """Whether packed copies of its weights make a model faster on this machine, and there is room for them: fp32 on
    some CPUs."""
    on_cpu = {(parameter.device.type, parameter.dtype) for parameter in model.parameters()} == {("cpu", torch.float32)}
    return on_cpu and packing_pays() and 2 * model.get_memory_footprint() < psutil.virtual_memory().available


def load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a target: `"demo"`, a folder or a Hub id; ValueError where it cannot be loaded."""
    with refusals(name, "tokenizer"):
        return AutoTokenizer.from_pretrained(checkpoint(name), trust_remote_code=trust_remote_code)


def load_target_config(
    target: str | Path | PreTrainedConfig | PreTrainedModel, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """Configuration of a target that is given as such, as a model, as `"demo"`, a folder or a Hub id."""
    if isinstance(target, PreTrainedConfig):
        return target
    if isinstance(target, PreTrainedModel):
        return target.config
    with refusals(target, "target"):
        return AutoConfig.from_pretrained(checkpoint(target), trust_remote_code=trust_remote_code)


def checkpoint(name: str | Path) -> str:
    """What `from_pretrained` calls a target that a command line calls `name`."""
    return _demo_target() if name == "demo" else str(name)


@cache  # it looks for the model and prints where it is: once is enough
def _demo_target() -> str:
    return str(demo_target_path())


def default_draft() -> str:
    """
    The demo target's draft: the folder in `hub_cards/` where this package, or the command, runs inside a clone of the
    repository, else its Hub id.
    """
    here = Path.cwd()
    for folder in (Path(__file__).parents[3], here, *here.parents):
        draft = folder / "hub_cards" / DEMO_DRAFT.split("/")[1]
        if (draft / "model.safetensors").is_file():
            return str(draft)
    return DEMO_DRAFT


def load_decoding_draft(name: str | Path, target: PreTrainedModel) -> ConFuDraftModel:
    """
    Load a draft to decode with a target: in eval mode, on the target's device and in its dtype, or with weights of
    eight bits where this CPU multiplies those faster. See [`load_draft`].
    """
    draft = load_draft(name, target.dtype).to(input_device(target))
    if int8_pays(draft):
        draft = load_draft(name, torch.bfloat16)
        use_int8_weights(draft)
        print(
            f"{name}: weights rounded to eight bits, which this CPU multiplies faster; the text is the target's own.",
            file=sys.stderr,
        )
    elif few_rows_are_slow(draft):
        use_packed_weights(draft)
    return draft


def load_draft(name: str | Path, dtype: torch.dtype | None = None) -> ConFuDraftModel:
    """Load a draft in eval mode, by its folder or Hub id; in its config's dtype if none is given."""
    try:
        with refusals(name, "draft"):
            return ConFuDraftModel.from_pretrained(name, dtype=dtype)
    except ValueError as error:
        if str(name) != DEMO_DRAFT:
            raise
        raise ValueError(
            f"{error} A clone of transformers-confu holds it: run the command there, or name a draft with --draft."
        ) from error


@contextmanager
def refusals(name: str | Path, what: str) -> Iterator[None]:
    """Say in one sentence why a checkpoint, expected to hold a `what`, cannot be loaded."""
    try:
        yield
    except StrictDataclassError as error:
        raise ValueError(f"{name}: its config cannot be that of a {what}. {error.__cause__ or error}") from error
    except SafetensorError as error:
        raise ValueError(f"{name}: its weights are damaged or incomplete ({error}); get them anew.") from error
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"The {what} {name} comes with code of its own. Read it, and if you trust it, allow it to run with "
                "--trust_remote_code (in Python: trust_remote_code=True)."
            ) from error
        where = f"holds no {what} that can be read"
        if not Path(name).is_dir():
            where = "is no folder and cannot be had from the Hub"
        raise ValueError(f"{name} {where} ({reason}).") from error
