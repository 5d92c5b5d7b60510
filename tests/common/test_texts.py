"""Answers as text for the next turn, and where two answers part."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import TokenizersBackend

from transformers_confu.common.texts import first_difference, visible_text


def test_marks_of_reasoning_stay_and_ends_go():
    words = ["<|end|>", "<|stop|>", "<think>", "</think>", "hm", "Paris"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="hm"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = TokenizersBackend(
        tokenizer_object=tokenizer, eos_token="<|end|>", extra_special_tokens=["<|stop|>", "<think>", "</think>"]
    )
    ids = [2, 4, 3, 5]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hm Paris"  # the reasoning, as if it were the answer
    text = "<think> hm </think> Paris"
    assert visible_text(tokenizer, ids) == visible_text(tokenizer, [*ids, 0]) == text
    assert visible_text(tokenizer, [*ids, 1], end_token_ids=[1]) == text
    assert visible_text(tokenizer, [0]) == visible_text(tokenizer, []) == ""


@pytest.mark.parametrize(
    ("one", "other", "place"),
    [([1, 2, 3], [1, 2, 3], None), ([1, 2, 3], [1, 4, 3], 1), ([1, 2], [1, 2, 3], 2), ([], [1], 0), ([], [], None)],
)
def test_first_difference(one, other, place):
    assert first_difference(one, other) == first_difference(other, one) == place
