"""Data and tokenizers that cannot be trained with are refused before any work is lost."""

import copy

import pytest
from datasets import Dataset, concatenate_datasets
from tokenizers import Tokenizer, models
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.utils import logging

from helpers import make_tiny_target
from transformers_confu.training.checks import check_dataset, check_tokenizer


@pytest.fixture(scope="module")
def target():
    return make_tiny_target(max_position_embeddings=40)


def make_dataset(*answers: int, prompt: int = 3, token: int = 7) -> Dataset:
    """Rows of a prompt and an answer of so many tokens."""
    ids = [[token] * (prompt + answer) for answer in answers]
    labels = [[-100] * prompt + [token] * answer for answer in answers]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def test_good_data_passes_as_it_is(target):
    dataset = make_dataset(4, 9, 37)
    assert check_dataset(dataset, target, "train_dataset", num_steps=6) is dataset


def test_rows_without_two_answer_tokens_in_a_row_are_left_out(target, caplog):
    logging.enable_propagation()
    dataset = concatenate_datasets([make_dataset(0, 5, 1, 2), make_dataset(1, prompt=0)])
    kept = check_dataset(dataset, target, "train_dataset", num_steps=2)
    assert [len(ids) for ids in kept["input_ids"]] == [8, 5]
    assert "3 of 5 rows of `train_dataset` have no answer to learn from; left out." in caplog.text


@pytest.mark.parametrize(
    "dataset, num_steps, message",
    [
        (Dataset.from_dict({"text": ["a"]}), 1, "has the columns text and lacks input_ids, labels; make it with"),
        (make_dataset(5, token=97), 1, "holds the token id 97, but LlamaForCausalLM has 97 tokens: prepare the data"),
        (make_dataset(0, 1), 1, "None of the 2 rows of `train_dataset` holds two answer tokens in a row"),
        (make_dataset(3, 4), 4, "`ttt_steps` is 4, but the longest answer of `train_dataset` has 4 tokens, which"),
        (make_dataset(38), 1, "has a row of 41 tokens, but LlamaForCausalLM was made for 40"),
    ],
    ids=["columns", "another tokenizer", "no answers", "steps", "length"],
)
def test_bad_data_is_refused(target, dataset, num_steps, message):
    with pytest.raises(ValueError) as error:
        check_dataset(dataset, target, "train_dataset", num_steps)
    assert message in str(error.value)


def test_a_tokenizer_of_another_target_is_refused(target, caplog):
    def tokenizer(size: int, **options) -> PreTrainedTokenizerFast:
        vocabulary = {f"word{index}": index for index in range(size)}
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary)), **options)

    check_tokenizer(tokenizer(90), target)
    target = copy.copy(target)
    target.generation_config = GenerationConfig(eos_token_id=[7, 8])
    check_tokenizer(tokenizer(90, eos_token="word8"), target)
    assert not caplog.records
    check_tokenizer(tokenizer(90, eos_token="word9"), target)
    assert (
        "The tokenizer ends a text by token 9, and LlamaForCausalLM by 7 or 8: is it the target's own?" in caplog.text
    )
    with pytest.raises(ValueError, match="The tokenizer has 98 tokens, LlamaForCausalLM only 97: use"):
        check_tokenizer(tokenizer(98), target)
