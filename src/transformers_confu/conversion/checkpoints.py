"""Reading checkpoints that others wrote: nothing in them is run, and what cannot be read is named."""

import pickle
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from ..common.files import read_json


# Names that decoder-only models of Transformers give their table of input embeddings.
EMBEDDINGS = ("embed_tokens.weight", "embed_in.weight", "wte.weight", "word_embeddings.weight")


def fetch(source: str | Path, revision: str | None = None) -> Path:
    """
    The folder of a checkpoint: a local one, or a copy of a Hub repository's, with pickles only if it has nothing
    better.
    """
    if Path(source).is_dir():
        return Path(source)
    try:
        folder = Path(snapshot_download(str(source), revision=revision, allow_patterns=["*.json", "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(str(source), revision=revision, allow_patterns=["*.json", "pytorch_model*.bin"])
    except HFValidationError as error:
        raise ValueError(f"'{source}' is neither a folder nor the id of a Hub repository.") from error
    except OSError as error:
        raise ValueError(f"{source} cannot be had from the Hub ({str(error).strip().splitlines()[0]}).") from error
    return folder


def require_new(folder: str | Path) -> None:
    """Refuse a folder that holds files."""
    if Path(folder).is_dir() and any(Path(folder).iterdir()):
        raise FileExistsError(f"{folder} is not empty; give a new folder, so that nothing is overwritten or mixed in.")


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """
    All tensors of a checkpoint folder on the CPU: safetensors, sharded or not, else PyTorch files without code.
    ValueError if there are none, or a file is damaged or holds more than tensors.
    """
    whole = folder / SAFE_WEIGHTS_NAME
    files = [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))
    files = files or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise ValueError(
            f"{folder} holds no weights; expected model.safetensors or pytorch_model.bin, or shards of either."
        )
    for index in folder.glob(f"*{files[0].suffix}.index.json"):
        # A shard lies beside its index, whatever path the index gives.
        named = {Path(file).name for file in read_json(index).get("weight_map", {}).values()}
        if missing := named - {file.name for file in files}:
            raise ValueError(f"{index} names the file {min(missing)}, which is not in {folder}.")
    return {name: tensor for file in files for name, tensor in _read_file(file).items()}


def _read_file(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors or is damaged; it was not run. Ask its author for safetensors."
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} is damaged or incomplete ({error}); get the file anew.") from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no plain dictionary of tensors; ask its author for safetensors.")
    return content


def read_target_embeddings(
    target: str | Path | PreTrainedConfig | PreTrainedModel, vocab_size: int, hidden_size: int
) -> torch.Tensor | None:
    """
    The target's table of input embeddings `(vocab_size, hidden_size)`, without loading more of a target than the file
    that holds it; `None` for a mere configuration and for a target whose table cannot be found.
    """
    shape = (vocab_size, hidden_size)
    if isinstance(target, PreTrainedModel):
        weight = getattr(target.get_input_embeddings(), "weight", None)
        plain = isinstance(weight, torch.Tensor) and not weight.is_meta and tuple(weight.shape) == shape
        return weight.detach().cpu() if plain else None
    if isinstance(target, PreTrainedConfig):
        return None
    files = {SAFE_WEIGHTS_NAME}
    if (index := _cached_file(target, SAFE_WEIGHTS_INDEX_NAME)) is not None:
        files = {file for name, file in read_json(index)["weight_map"].items() if "embed" in name or "wte" in name}
    for path in filter(None, (_cached_file(target, file) for file in sorted(files))):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no dictionary
                if name.endswith(EMBEDDINGS) and tuple(tensors.get_slice(name).get_shape()) == shape:
                    return tensors.get_tensor(name)
    return None


def _cached_file(target: str | Path, name: str) -> str | None:
    try:
        return cached_file(target, name)
    except OSError:  # there is none, or the Hub cannot be reached
        return None
