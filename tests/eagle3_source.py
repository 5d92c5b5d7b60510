"""EAGLE-3 drafts as other libraries write them, and their forward written out from EAGLE's own code.

Nothing here knows of ConFu: a [`Source`] says what a draft computes, `write` puts it into the words of one library,
and [`reference_logits`] computes it over whole sequences, without a cache.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file


@dataclass
class Source:
    """An EAGLE-3 draft. `taps` are the target layers whose *input* it reads."""

    form: Literal["flat", "speculators", "deepspec"]
    taps: tuple[int, ...]
    says_taps: bool = True
    hidden_size: int = 32
    target_hidden_size: int = 32
    intermediate_size: int = 56
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 8
    vocab_size: int = 97
    draft_vocab_size: int | None = 40
    num_target_layers: int = 8
    rope_theta: float = 5e4
    linear_factor: float | None = None  # RoPE type "linear"
    new_rope_words: bool = False
    eps: float = 1e-5
    norm_before_residual: bool = False
    says_norm_before_residual: bool = True
    norm_output: bool = False
    fc_norm: bool = False
    norm_before_fc: bool = False
    qk_norm: bool = False
    bias: bool = False
    embeddings: torch.Tensor | None = None  # what the file brings
    seed: int = 0

    def weights(self) -> dict[str, torch.Tensor]:
        """Random fp64 weights by the names of speculators and DeepSpec."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5 * 2

        def norm(size: int) -> torch.Tensor:
            return 1 + 0.3 * torch.randn(size, generator=generator, dtype=torch.float64)

        width, queries, keys = self.hidden_size, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        taps_size = len(self.taps) * self.target_hidden_size
        attention, mlp = "layers.0.self_attn", "layers.0.mlp"
        weights = {
            "fc.weight": normal(width, taps_size),
            f"{attention}.q_proj.weight": normal(queries, 2 * width),
            f"{attention}.k_proj.weight": normal(keys, 2 * width),
            f"{attention}.v_proj.weight": normal(keys, 2 * width),
            f"{attention}.o_proj.weight": normal(width, queries),
            f"{mlp}.gate_proj.weight": normal(self.intermediate_size, width),
            f"{mlp}.up_proj.weight": normal(self.intermediate_size, width),
            f"{mlp}.down_proj.weight": normal(width, self.intermediate_size),
            "layers.0.input_layernorm.weight": norm(width),
            "layers.0.hidden_norm.weight": norm(width),
            "layers.0.post_attention_layernorm.weight": norm(width),
            "norm.weight": norm(width),
            "lm_head.weight": normal(self.draft_vocab_size or self.vocab_size, width),
        }
        if self.bias:
            for name, size in (("q", queries), ("k", keys), ("v", keys), ("o", width)):
                weights[f"{attention}.{name}_proj.bias"] = normal(size) * size**0.5 / 4
        if self.qk_norm:
            weights |= {f"{attention}.{name}_norm.weight": norm(self.head_dim) for name in "qk"}
        if self.fc_norm:
            weights |= {f"fc_norm.{i}.weight": norm(self.target_hidden_size) for i in range(len(self.taps))}
        if self.norm_before_fc:
            weights["input_norm.weight"] = norm(taps_size)
        if self.embeddings is not None:
            weights["embed_tokens.weight"] = self.embeddings
        if self.draft_vocab_size is not None:
            token_ids = torch.randperm(self.vocab_size, generator=generator)[: self.draft_vocab_size].sort().values
            weights["d2t"] = token_ids - torch.arange(self.draft_vocab_size)
            weights["t2d"] = torch.zeros(self.vocab_size, dtype=torch.bool)
            weights["t2d"][token_ids] = True
        return weights

    def config(self) -> dict[str, Any]:
        """`config.json` in the words of the form."""
        layer: dict[str, Any] = {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": 1,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.eps,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": 64,
            "attention_bias": self.bias,
        }
        kind = "default" if self.linear_factor is None else "linear"
        factor = {} if self.linear_factor is None else {"factor": self.linear_factor}
        if self.new_rope_words:
            layer["rope_parameters"] = {"rope_type": kind, "rope_theta": self.rope_theta, **factor}
        else:
            layer |= {"rope_theta": self.rope_theta, "rope_scaling": {"type": kind, **factor} if factor else None}
        if self.form == "deepspec":
            return layer | {
                "architectures": ["Qwen3Eagle3Model"],
                "model_type": "qwen3",
                "num_target_layers": self.num_target_layers,
                "target_layer_ids": [tap - 1 for tap in self.taps],
                "ttt_length": 5,
                "step_loss_decay": 0.8,
            }
        switches = {name: True for name in ("norm_output", "fc_norm", "norm_before_fc") if getattr(self, name)}
        if self.form == "flat":
            layer |= {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "torch_dtype": "float16",
            } | switches
            if self.draft_vocab_size is not None:
                layer["draft_vocab_size"] = self.draft_vocab_size
            if self.says_taps:
                layer["eagle_config"] = {
                    "eagle_aux_hidden_state_layer_ids": [tap - 1 for tap in self.taps],
                    "use_aux_hidden_state": True,
                }
            if self.hidden_size != self.target_hidden_size:
                layer["target_hidden_size"] = self.target_hidden_size
            return layer
        config = {
            "architectures": ["Eagle3Speculator"],
            "speculators_model_type": "eagle3",
            "speculators_config": {"algorithm": "eagle3", "proposal_methods": [{"speculative_tokens": 3}]},
            "transformer_layer_config": layer | {"model_type": "qwen3" if self.qk_norm else "llama"},
            "draft_vocab_size": self.draft_vocab_size or self.vocab_size,
            "target_hidden_size": self.target_hidden_size,
            **switches,
        }
        if self.says_norm_before_residual:
            config["norm_before_residual"] = self.norm_before_residual
        if self.says_taps:
            config["eagle_aux_hidden_state_layer_ids"] = list(self.taps)
        return config

    def write(self, folder: Path, files: Literal["safetensors", "shards", "bin"] = "safetensors") -> Path:
        weights = self.weights()
        if self.form == "flat":
            weights = {name.replace("layers.0.", "midlayer."): tensor for name, tensor in weights.items()}
        write_checkpoint(folder, self.config(), weights, files)
        return folder


def write_checkpoint(folder: Path, config: dict, weights: dict[str, torch.Tensor], files: str = "safetensors") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if files == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
    elif files == "safetensors":
        save_file(weights, folder / "model.safetensors")
    else:
        names = sorted(weights)
        weight_map = {}
        for shard, part in enumerate((names[::2], names[1::2])):
            file = f"model-0000{shard + 1}-of-00002.safetensors"
            save_file({name: weights[name] for name in part}, folder / file)
            weight_map |= dict.fromkeys(part, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x: torch.Tensor, positions: torch.Tensor, source: Source) -> torch.Tensor:
    """Rotary embedding of `(heads, rows, head_dim)` as multiplication by complex numbers."""
    half = source.head_dim // 2
    frequencies = source.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = positions[:, None] * frequencies / (source.linear_factor or 1.0)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


def layer_outputs(source: Source, embeds: torch.Tensor, features: torch.Tensor, first_position: int) -> torch.Tensor:
    """Output of the decoder layer for `(rows, hidden_size)` inputs, each row seeing those before it and itself."""
    weights = source.weights()
    rows = len(features)

    def heads(x: torch.Tensor, name: str) -> torch.Tensor:
        projected = x @ weights[f"layers.0.self_attn.{name}_proj.weight"].T
        projected = projected + weights.get(f"layers.0.self_attn.{name}_proj.bias", 0.0)
        return projected.reshape(rows, -1, source.head_dim).transpose(0, 1)

    normed = rms_norm(features, weights["layers.0.hidden_norm.weight"], source.eps)
    x = torch.cat([rms_norm(embeds, weights["layers.0.input_layernorm.weight"], source.eps), normed], dim=-1)
    queries, keys, values = heads(x, "q"), heads(x, "k"), heads(x, "v")
    if source.qk_norm:
        queries = rms_norm(queries, weights["layers.0.self_attn.q_norm.weight"], source.eps)
        keys = rms_norm(keys, weights["layers.0.self_attn.k_norm.weight"], source.eps)
    positions = first_position + torch.arange(rows)
    queries, keys = rotate(queries, positions, source), rotate(keys, positions, source)
    group = source.num_heads // source.num_kv_heads
    scores = queries @ keys.repeat_interleave(group, 0).transpose(1, 2) / source.head_dim**0.5
    scores = scores.masked_fill(torch.ones(rows, rows, dtype=torch.bool).triu(1), -torch.inf)
    attended = (scores.softmax(-1) @ values.repeat_interleave(group, 0)).transpose(0, 1).reshape(rows, -1)
    attended = attended @ weights["layers.0.self_attn.o_proj.weight"].T
    attended = attended + weights.get("layers.0.self_attn.o_proj.bias", 0.0)

    stream = (normed if source.norm_before_residual else features) + attended
    inner = rms_norm(stream, weights["layers.0.post_attention_layernorm.weight"], source.eps)
    gate, up = (inner @ weights[f"layers.0.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    return stream + (torch.nn.functional.silu(gate) * up) @ weights["layers.0.mlp.down_proj.weight"].T


def fused(source: Source, hidden_states: list[torch.Tensor]) -> torch.Tensor:
    """Features `(rows, hidden_size)` of true rows; entry i of `hidden_states` is the input of layer i."""
    weights = source.weights()
    tapped = [hidden_states[tap] for tap in source.taps]
    if source.fc_norm:
        tapped = [rms_norm(tap, weights[f"fc_norm.{i}.weight"], source.eps) for i, tap in enumerate(tapped)]
    taps = torch.cat(tapped, dim=-1)
    if source.norm_before_fc:
        taps = rms_norm(taps, weights["input_norm.weight"], source.eps)
    return taps @ weights["fc.weight"].T


def reference_logits(
    source: Source, hidden_states: list[torch.Tensor], embeds: torch.Tensor, first_position: int = 0
) -> torch.Tensor:
    r"""
    Logits over the draft vocabulary of the last true row and of one drafted row for each embedding beyond the true
    rows', `(1 + drafted, draft_vocab_size)`.

    Args:
        hidden_states: Of the true rows, `(rows, target_hidden_size)` each.
        embeds: Of the token after each row, `(rows + drafted, hidden_size)`.
    """
    weights = source.weights()
    features = fused(source, hidden_states)
    logits = []
    while True:
        newest = layer_outputs(source, embeds[: len(features)], features, first_position)[-1]
        normed = rms_norm(newest, weights["norm.weight"], source.eps)
        logits.append(weights["lm_head.weight"] @ normed)
        if len(features) == len(embeds):
            return torch.stack(logits)
        features = torch.cat([features, (normed if source.norm_output else newest)[None]])
