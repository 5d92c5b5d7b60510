"""Tiny random targets: the logic of decoding in milliseconds, in fp64, where a difference is a fault, not rounding."""

import runpy
from pathlib import Path
from typing import Literal

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.generation.streamers import BaseStreamer

from transformers_confu import ConFuConfig, ConFuDraftModel


# The default 0.02 gives a greedy text that repeats one token for ever, on which wrong decoding looks right.
INITIALIZER_RANGE = 0.3
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": INITIALIZER_RANGE,
    "init_std": INITIALIZER_RANGE,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
}


def make_tiny_target(
    kind: Literal["llama", "qwen3", "windows", "hybrid"] = "llama",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **overrides,
) -> PreTrainedModel:
    """
    Build a random target: 5 layers, hidden size 32, 4 query and 2 key/value heads, vocabulary 97, no EOS.

    Args:
        kind: `"qwen3"` has normalised queries and keys, and heads (12) that do not divide the hidden size; `"windows"`
            too, and in its first, third and last layer each row sees only 6 rows; `"hybrid"` has attention in its
            second and last layer, and gated delta nets in the others.
        dtype: The weights are drawn in fp32 and then cast, so targets that differ in dtype only have equal weights.
        seed: Of the weights. The caller's random state stays as it was.
        overrides: Further entries of the config, such as `eos_token_id=5`.

    Returns:
        The target in eval mode on the CPU.
    """
    config_class, model_class, head_dim = {
        "llama": (LlamaConfig, LlamaForCausalLM, 8),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM, 12),
        "windows": (Qwen3Config, Qwen3ForCausalLM, 12),
        "hybrid": (Qwen3_5TextConfig, Qwen3_5ForCausalLM, 12),
    }[kind]
    settings = SIZES | {"head_dim": head_dim}
    if kind == "windows":
        settings["layer_types"] = ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]
        settings |= {"use_sliding_window": True, "sliding_window": 6}
    if kind == "hybrid":
        settings["layer_types"] = ["linear_attention", "full_attention", *["linear_attention"] * 2, "full_attention"]
        settings |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
        settings |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config_class(**(settings | overrides)))
    return model.to(dtype).eval()


def make_family(
    family: str,
    auto_class=AutoModelForCausalLM,
    attn_implementation: str | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **changes,
) -> PreTrainedModel:
    """A random target of any family of Transformers, in eval mode, with what of `SIZES` its config knows."""
    config_class = getattr(transformers, f"{family}Config")
    known = config_class().to_dict().keys() | set(config_class.attribute_map)
    settings = {name: value for name, value in SIZES.items() if name in known}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        target = auto_class.from_config(config_class(**settings | changes), attn_implementation=attn_implementation)
    for name, parameter in target.named_parameters():
        if name.endswith("correct_output_scale"):  # 0 in Gemma 3n, which would hide what its layers make of ids
            torch.nn.init.ones_(parameter)
    target.generation_config.eos_token_id = None
    return target.to(dtype).eval()


class Recorder(BaseStreamer):
    """Notes what it is given, call by call."""

    def __init__(self):
        self.events = []

    def put(self, value):
        self.events.append((value.dtype, value.tolist()))

    def end(self):
        self.events.append("end")


def word_tokenizer() -> PreTrainedTokenizerFast:
    """For a target of 13 tokens: words t0 to t11, and the one by which stop strings learn how words are joined."""
    words = Tokenizer(models.WordLevel({f"t{token}": token for token in range(12)} | {"abcdef": 12}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", bos_token="t1", pad_token="t0")


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """For a target of 97 tokens: the letters a to i, and pairs of them."""
    letters = "abcdefghi"
    tokens = ["<s>", "</s>", *letters, *(a + b for a in letters for b in letters)]
    vocabulary = {token: index for index, token in enumerate(tokens)} | {f"<{i}>": i for i in range(len(tokens), 97)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def example_models() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The tiny target and tokenizer of the examples, which have a chat template."""
    made = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "_targets.py"))
    return made["tiny_target"](), made["tiny_tokenizer"]()


def cached_tensors(cache: DynamicCache) -> list[torch.Tensor]:
    """Keys, values and states of all layers."""
    tensors = []
    for layer in cache.layers:
        tensors += [getattr(layer, "keys", None), getattr(layer, "values", None)]
        for states in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {})):
            tensors += states.values()
    return [tensor for tensor in tensors if tensor is not None]


def rotate(keys: torch.Tensor, position: int, theta: float = 10000.0) -> torch.Tensor:
    """Llama's RoPE, in complex numbers: `keys` `(..., hd)` moved by `position`. Number i goes with number i + hd/2."""
    half = keys.shape[-1] // 2
    angles = position / theta ** (torch.arange(half, dtype=torch.float32) / half)  # in fp32, as Llama has them
    turned = torch.complex(keys[..., :half], keys[..., half:]) * torch.complex(angles.cos(), angles.sin())
    return torch.cat([turned.real, turned.imag], dim=-1)


def make_tiny_draft(
    target: PreTrainedModel, dtype: torch.dtype | None = None, seed: int = 1, **overrides
) -> ConFuDraftModel:
    """
    Build a random draft for a tiny target, with 3 taps, 4 soft prompts and no parameter left at zero.

    Args:
        target: Gives every size, and the dtype unless one is given.
        dtype: The weights are drawn in fp32 and then cast.
        seed: Of the weights. The caller's random state stays as it was.
        overrides: Further entries of the config.

    Returns:
        The draft in eval mode on the CPU.
    """
    settings = {
        "target_hidden_state_indices": [1, 2, 4],
        "num_soft_prompts": 4,
        "initializer_range": INITIALIZER_RANGE,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        draft = ConFuDraftModel(ConFuConfig.from_target(target.config, **(settings | overrides)))
        if draft.future_channel.future_residual is not None:  # starts at zero, which would hide a fault in its use
            torch.nn.init.normal_(draft.future_channel.future_residual.weight, std=INITIALIZER_RANGE)
    return draft.to(dtype or target.dtype).eval()
