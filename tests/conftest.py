"""Fixtures and options shared by all tests."""

import atexit
import os
import shutil
import tempfile


# Before transformers is imported, which reads them once.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# Code that tests load from checkpoints goes here, not into the user's cache.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="confu-tests-")
# And so does the data that they read and tokenise.
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="confu-tests-")

import pytest
import torch

from transformers_confu.common.loading import load_target
from transformers_confu.inference import decoding
from transformers_confu.inference.round_costs import DRAFT_ROWS, TARGET_ROWS, RoundCosts


# Most models here are tiny, and to them a second thread costs more than it gives, many times more on a busy machine.
torch.set_num_threads(1)

for cache in ("HF_MODULES_CACHE", "HF_DATASETS_CACHE"):
    atexit.register(shutil.rmtree, os.environ[cache], ignore_errors=True)


def pytest_addoption(parser):
    parser.addoption(
        "--exactness",
        choices=("sample", "full"),
        default="sample",
        help="how many cases the comparison with plain generate covers",
    )
    parser.addoption("--fuzz-seeds", type=int, default=200, help="how many random calls test_fuzz.py tries")
    parser.addoption("--fuzz-first", type=int, default=0, help="the first seed of those")


@pytest.fixture(scope="session")
def exactness_scope(request) -> str:
    """`"sample"` or `"full"`, as given by `--exactness`."""
    return request.config.getoption("--exactness")


@pytest.fixture(autouse=True)
def known_costs(monkeypatch):
    """Automatic rounds by costs that are those of no machine: no clock decides what a test sees."""
    target_steps = (1.0, 1.1, 1.2, 1.4, 1.8, 2.6, 4.2)
    costs = RoundCosts(TARGET_ROWS, target_steps, DRAFT_ROWS, (0.1, 0.1, 0.12), step_seconds=0.02)
    monkeypatch.setattr(decoding, "round_costs", lambda target, draft, measure: costs)


@pytest.fixture(scope="session")
def smollm2():
    """The real target in fp32 and its tokenizer. Shared: a test that changes either must undo it. Mark it `slow`."""
    return load_target("demo", torch.float32, "cpu")


@pytest.fixture
def offline_hub(monkeypatch):
    """No request to the Hub: where there is no network each would be tried again and again, for minutes."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
