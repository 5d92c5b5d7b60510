"""Token ids as text that goes back into a conversation, and where two answers part."""

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase


# The largest gap of two scores that the rounding of fp32 explains; texts that part there are a proven tie.
TIE = 1e-4


def visible_text(
    tokenizer: PreTrainedTokenizerBase, token_ids: Iterable[int], end_token_ids: Iterable[int] = ()
) -> str:
    """
    An answer as the `content` of a message: without the tokens that end it, but with all other special tokens.

    Marks of reasoning such as `<think>` are special tokens of some models. `decode(skip_special_tokens=True)` drops
    the marks and leaves the reasoning, which the chat template can then not cut out of the next prompt.

    Args:
        tokenizer: The target's; its EOS and padding tokens end an answer.
        token_ids: Of the answer.
        end_token_ids: More tokens that end one, such as the target's `generation_config.eos_token_id`.
    """
    ends = {tokenizer.eos_token_id, tokenizer.pad_token_id, *end_token_ids}
    token_ids = list(token_ids)
    while token_ids and token_ids[-1] in ends:
        token_ids.pop()
    return tokenizer.decode(token_ids)


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Index of the first token in which two answers differ; a missing token differs too. `None` if they are equal."""
    for index, (mine, theirs) in enumerate(zip(one, other, strict=False)):
        if mine != theirs:
            return index
    return None if len(one) == len(other) else min(len(one), len(other))
