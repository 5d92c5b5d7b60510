"""EAGLE-3's map of the draft vocabulary: offsets d2t, marks t2d, and whether the two agree."""

import torch


def check_vocabulary_map(d2t: torch.Tensor, t2d: torch.Tensor, vocab_size: int) -> None:
    r"""
    Args:
        d2t (`torch.LongTensor` of shape `(draft_vocab_size,)`): Draft token i is target token `i + d2t[i]`.
        t2d (`torch.BoolTensor` of shape `(vocab_size,)`): The target tokens that the draft can predict.
        vocab_size (`int`): Tokens of the target.

    Raises:
        ValueError: one of them is no such map, or they name different tokens or the same ones in another order.
    """
    if d2t.dtype.is_floating_point or d2t.ndim != 1:
        raise ValueError(f"`d2t` holds {d2t.dtype} of shape {tuple(d2t.shape)}, expected a list of integers.")
    if tuple(t2d.shape) != (vocab_size,):
        raise ValueError(f"`t2d` has the shape {tuple(t2d.shape)}, expected ({vocab_size},), one entry per token.")
    size = len(d2t)
    token_ids = torch.arange(size, device=d2t.device) + d2t.long()
    marked = t2d.bool().nonzero()[:, 0]
    if torch.equal(marked, token_ids):
        return
    if torch.equal(marked, d2t.long()):
        raise ValueError("`d2t` holds token ids, expected offsets: token id minus index.")
    differ = int((marked != token_ids).sum()) if len(marked) == size else size
    raise ValueError(
        f"`d2t` and `t2d` name different tokens: `d2t` leads to {differ} of {size} tokens out of order, twice, "
        f"outside of 0..{vocab_size - 1} or unknown to `t2d`, which marks {len(marked)}; the draft would propose "
        "wrong tokens. Get the file anew, or have its author save it again."
    )


def marks_of(d2t: torch.Tensor, vocab_size: int) -> torch.BoolTensor:
    """The t2d that belongs to a d2t; tokens outside of the vocabulary are marked nowhere."""
    token_ids = torch.arange(len(d2t), device=d2t.device) + d2t.long()
    t2d = torch.zeros(vocab_size, dtype=torch.bool, device=d2t.device)
    t2d[token_ids[(token_ids >= 0) & (token_ids < vocab_size)]] = True
    return t2d
