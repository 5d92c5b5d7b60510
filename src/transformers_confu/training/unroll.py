"""Training-time test (TTT): the draft run on its own outputs, for all rows of a batch at once (EAGLE-3).

Shapes: B batch, T tokens, R draft rows of a sequence (padded), H draft width, hd head_dim. At step s row i pairs its
own output of step s-1 (its fused taps at s = 0) with the embedding of token i+1+s, at position i+s, and predicts token
i+2+s. It attends to the true rows up to i, to its own rows of steps 1..s (the diagonal) and to its future token.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import repeat_kv

from ..inference.modeling_confu import ConFuAttention, ConFuDraftModel, rotate
from .batch import gather_rows


def unroll(
    draft: ConFuDraftModel,
    inputs_embeds: torch.Tensor,
    features: torch.Tensor,
    position_ids: torch.LongTensor,
    sees: torch.BoolTensor,
    rows: torch.LongTensor,
    future_states: torch.Tensor | None,
    has_future: torch.BoolTensor | None,
    num_steps: int,
) -> Iterator[torch.Tensor]:
    r"""
    Outputs of the decoder layer, before `norm`, `(B, R, H)`, of one TTT step after the other.

    Args:
        inputs_embeds (`torch.FloatTensor` of shape `(batch, length, hidden_size)`): Token embeddings.
        features (`torch.FloatTensor` of shape `(batch, length, hidden_size)`): The target's taps, fused.
        position_ids (`torch.LongTensor` of shape `(batch, length)`).
        sees (`torch.BoolTensor` of shape `(batch, rows, length)`): True rows that a draft row sees: up to itself, no
            padding.
        rows (`torch.LongTensor` of shape `(batch, rows)`): Positions in the sequence of the rows to draft from.
        future_states (`torch.FloatTensor` of shape `(batch, rows, future_size)`, *optional*): The f of each row;
            `None` is EAGLE-3 mode.
        has_future (`torch.BoolTensor` of shape `(batch, rows)`, *optional*): Rows that have one; the others neither
            see the slot nor add the residual.
        num_steps: TTT steps; the depth used in decoding should not exceed it.
    """
    layer = draft.layers[0]
    attention: ConFuAttention = layer.self_attn

    # True rows: keys and values of the whole sequence, queries of `rows` only. The last position has no next token to
    # pair with; no row that is trained sees it.
    next_embeds = inputs_embeds.roll(-1, dims=1)
    hidden_states = layer.attention_input(next_embeds, features)  # (B, T, 2H)
    cos, sin = draft.rotary_emb(hidden_states, position_ids)
    groups = attention.num_key_value_groups
    true_keys = repeat_kv(rotate(attention.keys(hidden_states), cos, sin), groups)  # (B, h, T, hd)
    true_values = repeat_kv(attention.values(hidden_states), groups)

    features = gather_rows(features, rows)  # (B, R, H)
    row_positions = position_ids.gather(1, rows)
    future = None
    if future_states is not None:
        future = draft.future(future_states, features)
        if future.residual is not None:
            future.residual = future.residual * has_future[..., None]
    hidden_states = gather_rows(hidden_states, rows)

    keys: list[torch.Tensor] = []  # the diagonal, each (B, h, R, hd)
    values: list[torch.Tensor] = []
    for step in range(num_steps):
        if step > 0:
            shifted = (rows + 1 + step).clamp(max=inputs_embeds.shape[1] - 1)
            hidden_states = layer.attention_input(gather_rows(inputs_embeds, shifted), features)
        cos, sin = draft.rotary_emb(hidden_states, row_positions + step)
        queries = rotate(attention.queries(hidden_states), cos, sin)  # (B, h, R, hd)
        if step > 0:
            keys.append(repeat_kv(rotate(attention.keys(hidden_states), cos, sin), groups))
            values.append(repeat_kv(attention.values(hidden_states), groups))
        slot = None
        if future is not None:
            cos, sin = draft.rotary_emb(hidden_states, row_positions + step + 1)
            slot = (repeat_kv(rotate(future.key, cos, sin), groups), repeat_kv(future.value, groups))
        # Weights of attention, rows x tokens for every step, would be most of the memory of long rows. They are made
        # anew in the backward pass, which costs little beside the rest.
        attended = checkpoint(
            diagonal_attention,
            *(queries, true_keys, true_values, sees, tuple(keys), tuple(values), slot, has_future, attention.scaling),
            use_reentrant=False,
            preserve_rng_state=False,
        )
        outputs = layer.finish(features, attention.o_proj(attended), future)
        yield outputs
        features = draft.next_features(outputs)


def diagonal_attention(
    queries: torch.Tensor,
    true_keys: torch.Tensor,
    true_values: torch.Tensor,
    sees: torch.BoolTensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    slot: tuple[torch.Tensor, torch.Tensor] | None,
    sees_slot: torch.BoolTensor | None,
    scaling: float,
) -> torch.Tensor:
    r"""
    Attention of rows to the true rows, and of each row to its own earlier steps and slot.

    A row's own earlier steps and its slot are seen by that row alone, so their scores are computed row by row. One
    product of all queries with all keys would be larger by the number of steps, and nearly all of it masked.

    Args:
        queries, keys, values: Rotated, `(batch, heads, rows, head_dim)`; keys and values one entry per earlier step.
        true_keys, true_values (`torch.FloatTensor` of shape `(batch, heads, length, head_dim)`).
        sees (`torch.BoolTensor` of shape `(batch, rows, length)`).
        slot: Key and value of each row's future token, shaped like `queries`.
        sees_slot (`torch.BoolTensor` of shape `(batch, rows)`).

    Returns:
        `torch.FloatTensor` of shape `(batch, rows, heads * head_dim)`.
    """
    # The softmax in float32 at least.
    dtype = torch.promote_types(queries.dtype, torch.float32)
    lowest = torch.finfo(dtype).min
    scores = [(queries @ true_keys.transpose(2, 3)).to(dtype).masked_fill(~sees[:, None], lowest)]  # (B, h, R, T)
    scores += [(queries * key).sum(-1, keepdim=True).to(dtype) for key in keys]  # (B, h, R, 1)
    own_values = list(values)
    if slot is not None:
        slot_key, slot_value = slot
        score = (queries * slot_key).sum(-1, keepdim=True).to(dtype)
        scores.append(score.masked_fill(~sees_slot[:, None, :, None], lowest))
        own_values.append(slot_value)
    weights = nn.functional.softmax(torch.cat(scores, dim=-1) * scaling, dim=-1).to(true_values.dtype)
    length = true_keys.shape[2]
    output = weights[..., :length] @ true_values
    for index, value in enumerate(own_values):
        output = output + weights[..., length + index, None] * value
    return output.transpose(1, 2).flatten(2)
