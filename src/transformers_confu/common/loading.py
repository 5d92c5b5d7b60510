"""Models by what a command line calls them."""

from pathlib import Path

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
from .demo_target import load_demo_target


def dtype_named(name: str) -> torch.dtype:
    """
    The torch dtype of a name, such as `"bfloat16"`.

    Raises:
        ValueError: there is none.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype is {name!r}, expected the name of a torch dtype such as bfloat16.")
    return dtype


def default_device() -> str:
    """`"cuda"` if there is such a GPU, else `"cpu"`. Other accelerators are untested; ask for them by name."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device: torch.device | str | None = None) -> str:
    """
    `"bfloat16"` if `device` computes in it, else `"float32"`: an emulated bf16 takes many times as long.

    Args:
        device: `None` is [`default_device`].
    """
    kind = torch.device(device or default_device()).type
    native = True
    if kind == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif kind == "cpu":
        # AVX-512 and AMX of x86, and what ARM calls it. Older versions of torch cannot tell.
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return "bfloat16" if native else "float32"


def load_target(
    name: str, dtype: str, device: torch.device | str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Load a target in eval mode, and its tokenizer.

    Args:
        name: `"demo"`, a folder, or a Hub id.
        dtype: Name of a torch dtype, such as `"bfloat16"`.
        device: Where the model goes. `None` is the CPU.

    Raises:
        ValueError: `dtype` names none.
    """
    torch_dtype = dtype_named(dtype)
    if name == "demo":
        return load_demo_target(dtype=torch_dtype, device=device)
    target = AutoModelForCausalLM.from_pretrained(name, dtype=torch_dtype).to(device or "cpu").eval()
    return target, AutoTokenizer.from_pretrained(name)


def load_target_config(target: str | Path | PreTrainedConfig | PreTrainedModel) -> PreTrainedConfig:
    """Configuration of a target that is given as such, as a model, as a folder or as a Hub id."""
    if isinstance(target, PreTrainedConfig):
        return target
    if isinstance(target, PreTrainedModel):
        return target.config
    return AutoConfig.from_pretrained(target)


def load_draft(name: str, dtype: torch.dtype | None = None) -> ConFuDraftModel:
    """
    Load a draft in eval mode.

    Args:
        name: A folder or a Hub id.
        dtype: `None` is that of its config.

    Raises:
        ValueError: there is nothing of that name, or no draft, or one with damaged weights or an impossible config.
    """
    try:
        return ConFuDraftModel.from_pretrained(name, dtype=dtype)
    except StrictDataclassError as error:
        raise ValueError(f"{name}: its config cannot be that of a draft. {error.__cause__ or error}") from error
    except (OSError, ValueError, SafetensorError) as error:
        is_folder = Path(name).is_dir()
        what = "holds no draft that can be read" if is_folder else "is no folder and cannot be had from the Hub"
        raise ValueError(f"{name} {what} ({str(error).splitlines()[0]}).") from error
