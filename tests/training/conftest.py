"""Fixtures of the training tests."""

import gc
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers import make_tiny_target


@pytest.fixture(scope="package", autouse=True)
def quick_collections():
    """Trainer collects garbage at every start; what was imported long ago need not be looked through each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def keep_random_state():
    """Training seeds the global generator."""
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.fixture(scope="session")
def saved_target(tmp_path_factory) -> Path:
    """A tiny target and a tokenizer of its 97 tokens, in one folder."""
    folder = tmp_path_factory.mktemp("target")
    target = make_tiny_target(dtype=torch.float32, eos_token_id=96)
    target.save_pretrained(folder)
    vocabulary = {chr(32 + index): index for index in range(96)} | {"<end>": 96}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}>"
    fast.save_pretrained(folder)
    return folder
