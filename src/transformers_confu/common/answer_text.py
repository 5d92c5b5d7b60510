"""What ends an answer of a target, and the text of an answer that goes back into a conversation."""

from collections.abc import Collection, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def end_token_ids(target: PreTrainedModel) -> list[int]:
    """Ids that end an answer of the target, by its generation config; none if it names none."""
    eos = target.generation_config.eos_token_id
    if eos is None:
        return []
    return [eos] if isinstance(eos, int) else list(eos)


def answer_text(tokenizer: PreTrainedTokenizerBase, answer_ids: Sequence[int], ends: Collection[int]) -> str:
    """
    The text of an answer without the token that ended it.

    Other special tokens stay. Reasoning marks such as `<think>` are special tokens in some vocabularies, and the chat
    template finds and drops earlier reasoning by them: without the marks, it would stay in the next prompt.
    """
    ids = list(answer_ids)
    if ids and ids[-1] in ends:
        ids.pop()
    return tokenizer.decode(ids, skip_special_tokens=False)
