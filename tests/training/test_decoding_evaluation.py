"""Real decoding at evaluation time: tau from the rounds of `generate`, mismatches against plain `generate`."""

import pytest
import torch
from transformers.utils import logging

from helpers import make_tiny_draft, make_tiny_target
from transformers_confu import confu_generation_config
from transformers_confu.training import ConFuTrainer, ConFuTrainingArguments
from transformers_confu.training.decoding_callback import DecodingEvaluation


PROMPTS = [[3, 14, 15], [92, 65], [35, 89, 79, 32]]


@pytest.fixture(scope="module")
def target():
    return make_tiny_target(dtype=torch.float32)


@pytest.fixture
def trainer(target, tmp_path) -> ConFuTrainer:
    arguments = ConFuTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True)
    return ConFuTrainer(make_tiny_draft(target), target, arguments)


def test_it_measures_what_generate_does(target, trainer):
    draft = trainer.model
    config = confu_generation_config(target, do_sample=False, max_new_tokens=12, confu_tree_size=6)
    emitted = rounds = 0
    for prompt in PROMPTS:
        target.generate(torch.tensor([prompt]), generation_config=config, assistant_model=draft)
        emitted, rounds = emitted + sum(draft.last_statistics.emitted), rounds + draft.last_statistics.rounds
    draft.train()
    state = torch.get_rng_state()
    results = DecodingEvaluation(trainer, PROMPTS, max_new_tokens=12, confu_tree_size=6).measure()
    assert results == {"tau": round(emitted / rounds, 4), "mismatches": 0}
    assert draft.training and torch.equal(torch.get_rng_state(), state)


def test_it_follows_the_draft_and_counts_mismatches(trainer, caplog):
    logging.enable_propagation()
    evaluation = DecodingEvaluation(trainer, PROMPTS, max_new_tokens=12)
    trainer.add_callback(evaluation)
    metrics: dict[str, float] = {}
    evaluation.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
    assert metrics["eval_decoding_mismatches"] == 0
    assert trainer.state.log_history[-1]["eval_decoding_tau"] == metrics["eval_decoding_tau"]
    assert "differ" not in caplog.text

    evaluation.answers[1] = evaluation.answers[1] + 1
    assert evaluation.measure()["mismatches"] == 1
    assert "1 texts differ from plain `generate` in torch.float32" in caplog.text


def test_bad_settings_are_refused(trainer):
    with pytest.raises(ValueError, match="`prompts` is empty"):
        DecodingEvaluation(trainer, [])
    with pytest.raises(ValueError, match="confu_tree_size"):
        DecodingEvaluation(trainer, PROMPTS, confu_treesize=4)
