"""Decoding at evaluation time: tau from the rounds of `generate`."""

import pytest
import torch

from helpers import make_tiny_draft, make_tiny_target
from transformers_confu import confu_generation_config
from transformers_confu.training import ConFuTrainer, ConFuTrainingArguments, DecodingEvaluation


PROMPTS = [[3, 14, 15], [92, 65], [35, 89, 79, 32]]


@pytest.fixture
def trainer(tmp_path) -> ConFuTrainer:
    target = make_tiny_target(dtype=torch.float32)
    arguments = ConFuTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True)
    return ConFuTrainer(make_tiny_draft(target), target, arguments)


def test_it_measures_what_generate_does(trainer):
    draft, target = trainer.model, trainer.target_model
    config = confu_generation_config(target, do_sample=False, max_new_tokens=12)
    emitted = rounds = 0
    for prompt in PROMPTS:
        target.generate(torch.tensor([prompt]), generation_config=config, assistant_model=draft)
        emitted, rounds = emitted + sum(draft.last_statistics.emitted), rounds + draft.last_statistics.rounds
    draft.train()
    state = torch.get_rng_state()
    metrics: dict[str, float] = {}
    evaluation = DecodingEvaluation(trainer, PROMPTS, max_new_tokens=12)
    evaluation.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
    assert metrics == {"eval_decoding_tau": round(emitted / rounds, 4)}
    assert trainer.state.log_history[-1]["eval_decoding_tau"] == metrics["eval_decoding_tau"]
    assert draft.training and torch.equal(torch.get_rng_state(), state)


def test_no_prompts_are_refused(trainer):
    with pytest.raises(ValueError, match="`prompts` is empty"):
        DecodingEvaluation(trainer, [])
