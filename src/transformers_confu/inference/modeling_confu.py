"""The draft network: an EAGLE-3 core and ConFu's future channel.

Shapes: B batch, T rows, Q queried rows, H draft width, Ht target width, V and Vd target and draft vocabulary, F width
of the future prediction, hd head_dim. Facts of EAGLE-3 are from SafeAILab/EAGLE, `model/cnets.py`.
"""

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
    rotate_half,
)
from transformers.utils import ModelOutput

from .configuration_confu import ConFuConfig
from .generation_confu import ConFuGenerationMixin


@dataclass
class FutureToken:
    r"""
    The future token `[f]` as the draft's attention reads it: one extra key/value slot per row, never stored.

    Args:
        key (`torch.FloatTensor` of shape `(batch, num_key_value_heads, rows, head_dim)`): Not rotated; whoever attends
            rotates it to the position after its query's.
        value (`torch.FloatTensor`, same shape).
        residual (`torch.FloatTensor` of shape `(batch, rows, hidden_size)`, *optional*): Projection of f that is added
            to the residual stream, if `config.use_future_residual`.
    """

    key: torch.Tensor
    value: torch.Tensor
    residual: torch.Tensor | None


@dataclass
class ConFuDraftOutput(ModelOutput):
    r"""
    Args:
        logits (`torch.FloatTensor` of shape `(batch, queries, draft_vocab_size)`): Scores over the draft vocabulary.
        features (`torch.FloatTensor` of shape `(batch, queries, hidden_size)`): The features of the next drafted rows,
            see [`~ConFuDraftModel.next_features`].
        cache (`Cache`, *optional*): The draft's key/value cache with this call's rows appended.
    """

    logits: torch.FloatTensor | None = None
    features: torch.FloatTensor | None = None
    cache: Cache | None = None


class ConFuExpertMixture(nn.Module):
    r"""
    An embedding that depends on its input: the gated sum of the K most probable of E learned embeddings.

    The probabilities are a softmax over all E in float32. For K > 1 those of the chosen K are renormalised; for K = 1
    the probability itself is the gate, since a gate that is always 1 would leave the router without a gradient.
    """

    def __init__(self, input_size: int, num_experts: int, num_experts_per_token: int, size: int, eps: float):
        super().__init__()
        self.num_experts_per_token = num_experts_per_token
        self.norm = LlamaRMSNorm(input_size, eps)
        self.router = nn.Linear(input_size, num_experts, bias=False)
        self.experts = nn.Parameter(torch.empty(num_experts, size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(..., input_size)` -> `(..., size)`"""
        gates, chosen = self.route(hidden_states)  # (..., K)
        embeddings = self.experts[chosen]  # (..., K, size)
        return (gates.to(embeddings.dtype).unsqueeze(-1) * embeddings).sum(dim=-2)

    def route(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(..., input_size)` -> gates (float32) and expert numbers, both `(..., K)`"""
        probabilities = self.router(self.norm(hidden_states)).softmax(dim=-1, dtype=torch.float32)
        gates, chosen = probabilities.topk(self.num_experts_per_token, dim=-1)
        if self.num_experts_per_token > 1:
            gates = gates / gates.sum(dim=-1, keepdim=True)
        return gates, chosen


class ConFuFutureChannel(nn.Module):
    """Everything that ConFu adds to EAGLE-3; without this module's parameters a plain EAGLE-3 draft is left."""

    def __init__(self, config: ConFuConfig):
        super().__init__()
        self.soft_prompts = nn.Parameter(
            torch.empty(
                config.target_num_hidden_layers,
                2,  # key, value
                config.target_num_key_value_heads,
                config.num_soft_prompts,
                config.target_head_dim,
            )
        )
        self.contemplate_token = ConFuExpertMixture(
            config.taps_size,
            config.num_contemplate_experts,
            config.num_contemplate_experts_per_token,
            config.target_hidden_size,
            config.rms_norm_eps,
        )
        self.future_token = ConFuExpertMixture(
            config.hidden_size,
            config.num_future_experts,
            config.num_future_experts_per_token,
            config.hidden_size,
            config.rms_norm_eps,
        )
        self.future_projection = nn.Linear(config.future_size, config.hidden_size, bias=False)
        self.future_residual = (
            nn.Linear(config.future_size, config.hidden_size, bias=False) if config.use_future_residual else None
        )

    def slots(
        self, layer_idx: int, like: torch.Tensor, rotated_keys: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Soft-prompt keys and values of one target layer, `(B, num_key_value_heads, R * S, head_dim)` each.

        `like`, that layer's cached keys, gives batch size, device and dtype. `rotated_keys` `(layers, B,
        num_key_value_heads, R * S, head_dim)` are the keys of R sets of slots, each at a position of its own; without
        them R is 1 and the keys are used as they are.
        """
        keys, values = self.soft_prompts[layer_idx]
        if rotated_keys is not None:
            keys = rotated_keys[layer_idx]
            values = values.repeat(1, keys.shape[-2] // values.shape[-2], 1)
        keys, values = (states.to(device=like.device, dtype=like.dtype) for states in (keys, values))
        return keys.expand(like.shape[0], -1, -1, -1), values.expand(like.shape[0], -1, -1, -1)


class ConFuAttention(nn.Module):
    """Llama's attention over `cat(norm(embedding), norm(feature))`, width 2H, and one optional future slot."""

    def __init__(self, config: ConFuConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        bias = config.attention_bias
        self.q_proj = nn.Linear(2 * config.hidden_size, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(2 * config.hidden_size, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(2 * config.hidden_size, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=bias)
        self.q_norm = LlamaRMSNorm(self.head_dim, config.rms_norm_eps) if config.use_qk_norm else nn.Identity()
        self.k_norm = LlamaRMSNorm(self.head_dim, config.rms_norm_eps) if config.use_qk_norm else nn.Identity()

    def heads(self, projected: torch.Tensor) -> torch.Tensor:
        """`(B, T, heads * hd)` -> `(B, heads, T, hd)`"""
        return projected.view(*projected.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def queries(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Not rotated. `(B, T, 2H)` -> `(B, heads, T, hd)`"""
        return self.q_norm(self.heads(self.q_proj(hidden_states)))

    def keys(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Not rotated. `(B, T, 2H)` -> `(B, kv_heads, T, hd)`"""
        return self.k_norm(self.heads(self.k_proj(hidden_states)))

    def values(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(B, T, 2H)` -> `(B, kv_heads, T, hd)`"""
        return self.heads(self.v_proj(hidden_states))

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        future: FutureToken | None = None,
        future_position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        num_queries: int | None = None,
    ) -> torch.Tensor:
        queried = hidden_states if num_queries is None else hidden_states[:, -num_queries:]
        query_states = self.queries(queried)  # (B, heads, Q, hd)
        key_states = self.keys(hidden_states)  # (B, kv_heads, T, hd)
        value_states = self.values(hidden_states)

        cos, sin = position_embeddings
        num_rows = query_states.shape[2]
        query_states, _ = apply_rotary_pos_emb(query_states, query_states, cos[:, -num_rows:], sin[:, -num_rows:])
        _, key_states = apply_rotary_pos_emb(key_states, key_states, cos, sin)

        if cache is not None:
            key_states, value_states = cache.update(key_states, value_states, self.layer_idx)
        if future is not None:
            # After the update: the slot is read by this call's queries and stored by none.
            key_states = torch.cat([key_states, rotate(future.key, *future_position_embeddings)], dim=-2)
            value_states = torch.cat([value_states, future.value], dim=-2)
            if attention_mask is not None:
                attention_mask = nn.functional.pad(attention_mask, (0, 1))  # 0 = visible

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attention_output, _ = attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=0.0,  # in training too: decoding must not differ from it, nor draw random numbers
            scaling=self.scaling,
        )
        return self.o_proj(attention_output.flatten(2))  # (B, Q, H)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of `states` `(B, heads, T, hd)` by `cos` and `sin` `(B, T, hd)`."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return states * cos + rotate_half(states) * sin


class ConFuDecoderLayer(nn.Module):
    """EAGLE-3's decoder layer: attention reads embedding and feature, the residual stream starts as the feature."""

    def __init__(self, config: ConFuConfig, layer_idx: int):
        super().__init__()
        self.self_attn = ConFuAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm_before_residual = config.norm_before_residual

    def attention_input(self, inputs_embeds: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Embeddings and features `(B, T, H)` -> `(B, T, 2H)`, the embedding half first."""
        return torch.cat([self.input_layernorm(inputs_embeds), self.hidden_norm(features)], dim=-1)

    def finish(
        self, features: torch.Tensor, attention_output: torch.Tensor, future: FutureToken | None
    ) -> torch.Tensor:
        """What follows the attention: its input's features `(B, Q, H)` and its output -> output of the layer."""
        residual = self.hidden_norm(features) if self.norm_before_residual else features
        hidden_states = residual + attention_output
        if future is not None and future.residual is not None:
            # Here and not before the attention, so that the stored keys and values never depend on f.
            hidden_states = hidden_states + future.residual
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    def forward(
        self, inputs_embeds: torch.Tensor, features: torch.Tensor, future: FutureToken | None, **attention_kwargs: Any
    ) -> torch.Tensor:
        attention_output = self.self_attn(
            self.attention_input(inputs_embeds, features), future=future, **attention_kwargs
        )
        return self.finish(features[:, -attention_output.shape[1] :], attention_output, future)


class ConFuPreTrainedModel(PreTrainedModel):
    config: ConFuConfig
    config_class = ConFuConfig
    base_model_prefix = ""
    _no_split_modules = ["ConFuDecoderLayer"]
    _skip_keys_device_placement = ["cache"]
    _supports_sdpa = True
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, ConFuExpertMixture):
            init.normal_(module.experts, std=self.config.initializer_range)
        elif isinstance(module, ConFuFutureChannel):
            init.normal_(module.soft_prompts, std=self.config.initializer_range)
            if module.future_residual is not None:
                # An untrained channel must not disturb a trained core.
                init.zeros_(module.future_residual.weight)
        elif isinstance(module, ConFuDraftModel):
            # Loaded weights may come without these buffers, as those of EAGLE-3 drafts that predict every token do.
            init.zeros_(module.d2t)
            init.copy_(module.t2d, torch.arange(self.config.vocab_size) < self.config.draft_vocab_size)


class ConFuDraftModel(ConFuGenerationMixin, ConFuPreTrainedModel):
    r"""
    A ConFu draft: give it to a target's `generate` as `assistant_model`.

    ```python
    >>> draft = ConFuDraftModel.from_pretrained("path/or/repository")
    >>> target.generate(**inputs, assistant_model=draft)
    ```

    The text is the target's own, token for token. Alone the draft generates nothing. Nothing of a call lives on the
    draft, so threads may share it; `last_statistics` is replaced whole when a call ends.
    """

    def __init__(self, config: ConFuConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size) if config.has_own_embeddings else None
        self.fc_norm = (
            nn.ModuleList(
                LlamaRMSNorm(config.target_hidden_size, config.rms_norm_eps)
                for _ in config.target_hidden_state_indices
            )
            if config.fc_norm
            else None
        )
        self.input_norm = LlamaRMSNorm(config.taps_size, config.rms_norm_eps) if config.norm_before_fc else None
        self.fc = nn.Linear(config.taps_size, config.hidden_size, bias=False)
        self.layers = nn.ModuleList([ConFuDecoderLayer(config, layer_idx=0)])
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.future_channel = ConFuFutureChannel(config)
        # Draft token i is target token i + d2t[i]; t2d marks the target tokens that the draft can predict.
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.long))
        self.register_buffer("t2d", torch.arange(config.vocab_size) < config.draft_vocab_size)
        # Tells the state that a cache carries from that of another draft.
        self.instance_id = uuid.uuid4().hex
        self.post_init()

    def get_input_embeddings(self) -> nn.Module | None:
        """The draft's own embedding table, or `None` where it reads the target's."""
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    @property
    def draft_token_ids(self) -> torch.LongTensor:
        """Target token ids of the draft vocabulary, `(Vd,)`, rising."""
        return torch.arange(self.config.draft_vocab_size, device=self.d2t.device) + self.d2t

    def set_draft_vocabulary(self, token_ids: torch.LongTensor) -> None:
        """Map draft tokens to `token_ids`, `(Vd,)` distinct target ids; sorted here."""
        size, vocab_size = self.config.draft_vocab_size, self.config.vocab_size
        token_ids = torch.as_tensor(token_ids, dtype=torch.long).unique().to(self.d2t.device)
        if token_ids.numel() != size or token_ids[0] < 0 or token_ids[-1] >= vocab_size:
            found = f" in {token_ids[0].item()}..{token_ids[-1].item()}" if token_ids.numel() else ""
            raise ValueError(
                f"A draft vocabulary of {size} needs {size} distinct token ids in 0..{vocab_size - 1}, got "
                f"{token_ids.numel()}{found}."
            )
        self.d2t.copy_(token_ids - torch.arange(size, device=token_ids.device))
        self.t2d.zero_()
        self.t2d[token_ids] = True

    def fuse_taps(self, taps: torch.Tensor) -> torch.Tensor:
        """Concatenated taps of the target `(..., taps_size)` -> features of true rows `(..., H)`"""
        if self.fc_norm is not None:
            each = taps.split(self.config.target_hidden_size, dim=-1)
            taps = torch.cat([norm(tap) for norm, tap in zip(self.fc_norm, each, strict=True)], dim=-1)
        if self.input_norm is not None:
            taps = self.input_norm(taps)
        return self.fc(taps)

    def next_features(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Output of the decoder layer `(..., H)` -> features of the rows drafted behind"""
        return self.norm(hidden_states) if self.config.norm_output else hidden_states

    def future(self, future_states: torch.Tensor, fused_taps: torch.Tensor) -> FutureToken:
        r"""
        The future token `[f]`.

        Args:
            future_states (`torch.FloatTensor` of shape `(batch, rows, future_size)`): Future predictions f.
            fused_taps (`torch.FloatTensor` of shape `(batch, rows, hidden_size)`): `fuse_taps` of the token
                behind which the draft starts; routes the embedding of `[f]`.
        """
        channel, layer = self.future_channel, self.layers[0]
        attention = layer.self_attn
        hidden_states = layer.attention_input(
            channel.future_token(fused_taps), channel.future_projection(future_states)
        )  # (B, rows, 2H)
        return FutureToken(
            key=attention.keys(hidden_states),
            value=attention.values(hidden_states),
            residual=None if channel.future_residual is None else channel.future_residual(future_states),
        )

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        features: torch.Tensor,
        position_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        future: FutureToken | None = None,
        num_queries: int | None = None,
    ) -> ConFuDraftOutput:
        r"""
        One draft step. Row i holds the feature at position i and the embedding of token i+1, and predicts token i+2.

        Args:
            inputs_embeds (`torch.FloatTensor` of shape `(batch, rows, hidden_size)`): Embeddings of the next tokens.
            features (`torch.FloatTensor` of shape `(batch, rows, hidden_size)`): `fuse_taps` where the target's
                hidden states are known, the draft's own `features` elsewhere.
            position_ids (`torch.LongTensor` of shape `(batch, rows)`): Positions of the features.
            attention_mask (`torch.FloatTensor` of shape `(batch, 1, queries, cached + rows)`, *optional*): Additive.
                May be left out for a single query, which then sees everything.
            cache ([`Cache`], *optional*): The draft's cache; the rows are appended.
            future ([`FutureToken`], *optional*): One `[f]` for all queries, which must then share one position;
                without it this is plain EAGLE-3.
            num_queries (`int`, *optional*): Compute outputs for the last rows only; the others are just stored.
        """
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        hidden_states = self.layers[0](
            inputs_embeds,
            features,
            future,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            cache=cache,
            future_position_embeddings=self.rotary_emb(inputs_embeds, position_ids[:, -1:] + 1) if future else None,
            num_queries=num_queries,
        )
        return ConFuDraftOutput(
            logits=self.lm_head(self.norm(hidden_states)),
            features=self.next_features(hidden_states),
            cache=cache,
        )


ConFuDraftModel.register_for_auto_class("AutoModel")

__all__ = ["ConFuDraftModel", "ConFuPreTrainedModel"]
