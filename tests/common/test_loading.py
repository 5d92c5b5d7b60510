"""Which dtype models are loaded in where none is asked for."""

import logging

import pytest
import torch

from transformers_confu.common.loading import default_dtype
from transformers_confu.evaluation.arguments import EvaluationArguments
from transformers_confu.training import ConFuTrainingArguments


EPYC_9004 = {"architecture": "x86_64", "avx2": True, "avx512_f": True, "avx512_bf16": True, "amx_bf16": False}
SKYLAKE_X = {"architecture": "x86_64", "avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}
GRAVITON_3 = {"architecture": "arm64", "neon": True, "bf16": True}


@pytest.fixture
def cpu(monkeypatch):
    """Lets torch believe that it runs on such a CPU, without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return lambda capabilities: monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)


@pytest.mark.parametrize(
    ("capabilities", "dtype"), [(EPYC_9004, "bfloat16"), (SKYLAKE_X, "float32"), (GRAVITON_3, "bfloat16")]
)
def test_bf16_where_the_cpu_computes_in_it(cpu, capabilities, dtype):
    cpu(capabilities)
    assert default_dtype() == default_dtype("cpu") == default_dtype(torch.device("cpu")) == dtype
    assert EvaluationArguments(output="records.jsonl").dtypes == [dtype]


def test_float32_where_torch_cannot_tell(cpu, monkeypatch):
    cpu(EPYC_9004)
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert default_dtype() == "float32"


@pytest.mark.parametrize(("native", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_a_gpu_counts_before_the_cpu(monkeypatch, native, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    # An older GPU emulates bf16, slowly.
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation
    )
    assert default_dtype() == default_dtype("cuda:1") == dtype


@pytest.mark.parametrize(("capabilities", "warns"), [(EPYC_9004, False), (SKYLAKE_X, True)])
def test_training_in_emulated_bf16_warns(cpu, capabilities, warns, tmp_path, caplog, monkeypatch):
    cpu(capabilities)
    monkeypatch.setattr(logging.getLogger("transformers_confu"), "propagate", True)
    for bf16 in (False, True):
        arguments = ConFuTrainingArguments(output_dir=str(tmp_path), bf16=bf16, use_cpu=True)
        assert arguments.target_dtype == ("float32" if warns else "bfloat16")
        assert ("Leave it out (`--bf16 false`)" in caplog.text) == (bf16 and warns)
