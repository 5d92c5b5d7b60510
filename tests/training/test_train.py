"""The training command: one run or stages, from files and options; skipped, continued or refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback
from transformers.utils import logging

from commands import weights_of, write_run
from helpers import make_tiny_target
from transformers_confu import ConFuDraftModel
from transformers_confu.common.weight_layout import PackedLinear
from transformers_confu.inference.knobs import ConFuKnobs
from transformers_confu.publishing.model_card import CardFacts
from transformers_confu.training import ConFuTrainer
from transformers_confu.training.train import load_target_once, main


def test_the_command_trains_a_new_draft_and_continues_it(saved_target, tmp_path, capsys):
    main([write_run(tmp_path, saved_target)])
    printed = capsys.readouterr().out
    assert "rows: 12 made of 12" in printed and "Draft vocabulary: 50 tokens" in printed
    assert "eval_tau_greedy" in printed
    first = ConFuDraftModel.from_pretrained(tmp_path / "draft")
    assert (first.config.draft_vocab_size, first.config.num_soft_prompts) == (50, 5)
    assert first.t2d[96], "a draft that cannot propose the end loses the last round of each answer"
    assert (tmp_path / "draft" / "tokenizer.json").exists()

    target = make_tiny_target(dtype=torch.float32, eos_token_id=96)
    ids = torch.tensor([[3, 14, 15]])
    plain = target.generate(ids, do_sample=False, max_new_tokens=10)
    assert torch.equal(target.generate(ids, do_sample=False, max_new_tokens=10, assistant_model=first), plain)

    draft = str(tmp_path / "draft")
    main([write_run(tmp_path, saved_target, draft=draft, learning_rate=0.0, output_dir=str(tmp_path / "second"))])
    second = ConFuDraftModel.from_pretrained(tmp_path / "second")
    for name, value in second.state_dict().items():
        assert torch.equal(value, first.state_dict()[name]), name


def test_the_form_of_a_new_draft_is_an_option_and_a_draft_keeps_it(saved_target, tmp_path):
    run = write_run(tmp_path, saved_target, max_steps=1)
    main([run])
    form = {"num_contemplate_experts": 1, "num_contemplate_experts_per_token": 1, "fc_norm": False}
    form |= {"num_soft_prompts": 3, "rotate_soft_prompts": True}
    second = [run, f"--output_dir={tmp_path / 'second'}"]
    main([*second, f"--draft_config={json.dumps(form)}", "--instruction="])
    first, other = (ConFuDraftModel.from_pretrained(tmp_path / name) for name in ("draft", "second"))
    assert (first.config.num_contemplate_experts, first.config.num_soft_prompts) == (8, 5)
    assert first.config.fc_norm and first.config.norm_output
    assert {name: getattr(other.config, name) for name in form} == form
    # Keys of a text are far larger than random ones.
    assert other.future_channel.soft_prompts.std() < 0.1 * first.future_channel.soft_prompts.std()
    again = [run, f"--draft={tmp_path / 'draft'}", f"--output_dir={tmp_path / 'third'}"]
    for arguments, message in (
        ([*second, '--draft_config={"num_experts": 1}'], "names `num_experts`, which is no .* did you mean `num_"),
        ([*second, '--draft_config={"draft_vocab_size": 1}'], "names `draft_vocab_size`, .* did you mean `vocab_size"),
        ([*again, "--draft_vocab_size=20"], "`draft_vocab_size` is 20, and .*draft, the .* from, has 50: it is an"),
    ):
        with pytest.raises(ValueError, match=message):
            main(arguments)
    main([*again, '--draft_config={"num_future_experts": 8}'])  # as it is


def test_stages_may_differ_in_precision_and_in_what_is_frozen(saved_target, tmp_path, monkeypatch):
    stages = [
        {"stage": "core", "max_steps": 3, "bf16": True, "frozen": []},
        {"stage": "joint", "max_steps": 3, "bf16": False},
        {"stage": "joint", "max_steps": 3, "bf16": True, "output_dir": str(tmp_path / "last")},
    ]
    precisions, train = [], ConFuTrainer.train

    def record(self, *args, **kwargs):
        precisions.append(self.accelerator.mixed_precision)
        return train(self, *args, **kwargs)

    monkeypatch.setattr(ConFuTrainer, "train", record)
    main([write_run(tmp_path, saved_target, stages=stages, frozen=["core"], output_dir=str(tmp_path / "runs"))])
    assert precisions == ["bf16", "no", "bf16"]
    core, joint, last = (weights_of(tmp_path / name) for name in ("runs/core", "runs/joint", "last"))
    assert torch.equal(core["fc.weight"], joint["fc.weight"]) and torch.equal(joint["fc.weight"], last["fc.weight"])
    taught = "future_channel.future_projection.weight"
    assert not torch.equal(joint[taught], last[taught])


def test_the_command_leaves_the_facts_of_a_card(saved_target, tmp_path):
    stages = [{"stage": "core"}, {"stage": "joint"}]
    run = write_run(tmp_path, saved_target, stages=stages, output_dir=str(tmp_path / "runs"), max_steps=1)
    main([run])
    facts = CardFacts.load(tmp_path / "runs" / "joint" / "card.yaml")
    assert facts.training.index("Stage `core`: 1 steps") < facts.training.index("Stage `joint`: 1 steps")
    assert facts.base_model is None and "Teacher-forced on held-out rows at step 1: `tau_greedy`" in facts.evaluation


def test_a_checkpoint_of_the_last_step_is_not_trained_further(saved_target, tmp_path, monkeypatch):
    """What is left of a run that ended between its training and its last evaluation."""
    run = write_run(tmp_path, saved_target, save_strategy="steps", save_steps=3, lr_scheduler_type="constant")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(ConFuTrainer, "evaluate", fail)
        main([run])
    before = weights_of(tmp_path / "draft")
    main([run])
    assert not (tmp_path / "draft" / "checkpoint-4").exists()
    for name, value in weights_of(tmp_path / "draft").items():
        assert torch.equal(value, before[name]), name


def test_a_run_that_could_not_be_continued_is_refused(saved_target, tmp_path):
    with pytest.raises(ValueError, match="`save_only_model` leaves checkpoints that an interrupted run cannot go on"):
        main([write_run(tmp_path, saved_target, save_only_model=True)])
    assert not (tmp_path / "draft").exists()


def fail(*args, **kwargs):
    raise RuntimeError("out of memory")


def test_held_out_prompts_are_the_same_in_every_stage_and_file(saved_target, tmp_path, monkeypatch):
    """A prompt with a second answer in another file, and other lengths, stays on its side."""
    seen = []
    monkeypatch.setattr(
        ConFuTrainer, "train", lambda self, **kwargs: seen.append((self.train_dataset, self.eval_dataset))
    )
    run = write_run(tmp_path, saved_target, eval_rows=100)
    main([run])
    first = (tmp_path / "data.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "data.jsonl").write_text("".join(reversed(first[:9])))
    (tmp_path / "more.jsonl").write_text("".join(line.replace(": [", ": [7, ") for line in first))
    output = f"--output_dir={tmp_path / 'second'}"
    main([run, "--data", str(tmp_path / "more.jsonl"), str(tmp_path / "data.jsonl"), "--max_length=20", output])
    (trained, held_out), (later_trained, later_held_out) = (
        (set(train["prompt_hash"]), set(evaluation["prompt_hash"])) for train, evaluation in seen
    )
    assert len(seen[1][0]) + len(seen[1][1]) == 21
    assert (trained, held_out) == (later_trained, later_held_out) and not trained & held_out and held_out


def test_answers_of_another_target_are_refused(saved_target, tmp_path):
    run = write_run(tmp_path, saved_target, max_steps=1, eval_rows=0)
    rows = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    rows[3]["made_with"] = {"target": "another"}
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="its answer was made by another target"):
        main([run])
    main([run, "--allow_other_target=true"])


def test_no_stopwatch_decides_whether_weights_are_packed(saved_target, tmp_path, monkeypatch):
    """Processes that decide it by their own measurement would not agree, and DDP ends with an error."""
    monkeypatch.setattr("transformers_confu.common.loading.packing_pays", lambda: True)
    load_target_once.cache_clear()
    trained: list[ConFuTrainer] = []
    monkeypatch.setattr(ConFuTrainer, "train", lambda self, **kwargs: trained.append(self))
    stages = [{"stage": "core"}, {"stage": "joint"}]
    main([write_run(tmp_path, saved_target, stages=stages, output_dir=str(tmp_path / "runs"), eval_rows=0)])
    models = [model for trainer in trained for model in (trainer.model, trainer.target_model)]
    assert len(models) == 4
    assert not any(isinstance(module, PackedLinear) for model in models for module in model.modules())


# Stages


STAGES = [
    {"stage": "core", "max_steps": 3},
    {"stage": "contemplation", "max_steps": 4, "learning_rate": "1e-2"},
    {"stage": "joint", "max_steps": 3},
]


def test_three_stages_follow_from_each_other(saved_target, tmp_path, capsys):
    stages = [*STAGES[:2], STAGES[2] | {"ttt_steps": 3}]
    run = write_run(tmp_path, saved_target, stages=stages, output_dir=str(tmp_path / "runs"))
    main([run])
    core, contemplation, joint = (weights_of(tmp_path / "runs" / name) for name in ("core", "contemplation", "joint"))
    for name in core:
        is_of_contemplation = name.startswith(("future_channel.soft_prompts", "future_channel.contemplate_token."))
        assert torch.equal(core[name], contemplation[name]) != is_of_contemplation, name
        assert torch.equal(contemplation[name], joint[name]) == (name in ("d2t", "t2d")), name
    # Rounds stay automatic; an untrained channel is off.
    drafts = [ConFuDraftModel.from_pretrained(tmp_path / "runs" / name) for name in ("core", "contemplation", "joint")]
    assert [ConFuKnobs.of(draft.generation_config) for draft in drafts] == [
        {"confu_contemplation": 0},
        {},
        {},
    ]

    capsys.readouterr()
    before = (tmp_path / "runs" / "joint" / "model.safetensors").stat().st_mtime_ns
    main([run])
    printed = capsys.readouterr().out
    for stage in ("core", "contemplation", "joint"):
        assert f"Stage {stage}: finished, in {tmp_path / 'runs' / stage}" in printed
    assert (tmp_path / "runs" / "joint" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("stage, step", [("contemplation", 3), ("joint", 2)])
def test_an_interrupted_stage_is_continued(saved_target, tmp_path, capsys, caplog, stage, step):
    logging.enable_propagation()
    settings = {"stages": STAGES, "save_strategy": "steps", "save_steps": 1, "eval_rows": 0}
    main([write_run(tmp_path, saved_target, output_dir=str(tmp_path / "whole"), **settings)])

    class Interruption(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if args.stage == stage and state.global_step > step:
                raise KeyboardInterrupt

    run = write_run(tmp_path, saved_target, output_dir=str(tmp_path / "parts"), **settings)
    with pytest.MonkeyPatch.context() as patch:
        train = ConFuTrainer.train
        patch.setattr(
            ConFuTrainer, "train", lambda self, **kwargs: (self.add_callback(Interruption()), train(self, **kwargs))
        )
        with pytest.raises(KeyboardInterrupt):
            main([run])
    # A checkpoint that was being written when the machine went down is not one.
    (tmp_path / "parts" / stage / "checkpoint-99").mkdir()
    capsys.readouterr()
    main([run])
    assert "checkpoint-99 was not written to its end, and is left out" in caplog.text
    assert (
        f"Stage {stage}: continues from {tmp_path / 'parts' / stage / f'checkpoint-{step}'}" in capsys.readouterr().out
    )
    whole, parts = (weights_of(tmp_path / name / "joint") for name in ("whole", "parts"))
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name


def test_a_run_of_other_options_is_not_overwritten(saved_target, tmp_path):
    run = write_run(tmp_path, saved_target, max_steps=1)
    main([run])
    main([run, "--logging_steps=3", "--save_steps=7"])  # nothing that changes the outcome
    with pytest.raises(ValueError) as error:
        main([run, "--learning_rate=1e-5"])
    assert str(error.value) == (
        f"{tmp_path / 'draft'} holds a finished run with other options (learning_rate was 0.0003, is 1e-05): use "
        "another `output_dir`, or delete this one to train anew."
    )
    with pytest.raises(ValueError, match="load_best_model_at_end was False, is True"):
        main([run, "--load_best_model_at_end=true"])


def test_a_later_stage_is_refused_before_the_first_has_run(saved_target, tmp_path):
    run = write_run(tmp_path, saved_target, stages=STAGES, output_dir=str(tmp_path / "runs"))
    (tmp_path / "runs" / "joint").mkdir(parents=True)
    (tmp_path / "runs" / "joint" / "_run.json").write_text(json.dumps({"finished": True, "options": {"seed": 1}}))
    with pytest.raises(ValueError, match=r"joint holds a finished run with other options .*seed was 1, is 42"):
        main([run])
    assert not (tmp_path / "runs" / "core" / "_run.json").exists()


def test_an_interrupted_run_goes_on_with_its_own_batches_alone(saved_target, tmp_path):
    run = write_run(tmp_path, saved_target, max_steps=1, eval_rows=0, save_strategy="steps", save_steps=1)
    main([run])
    record, data = tmp_path / "draft" / "_run.json", tmp_path / "data.jsonl"
    interrupted = json.loads(record.read_text()) | {"finished": False}
    record.write_text(json.dumps(interrupted))
    rows = data.read_text()
    data.write_text("".join(rows.splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError) as error:
        main([run])
    assert str(error.value).startswith(
        f"{tmp_path / 'draft'} holds an interrupted run, which would go on with other batches (data was "
        f"'{interrupted['conditions']['data']}', is '"
    )
    data.write_text(rows)
    record.write_text(json.dumps(interrupted | {"conditions": interrupted["conditions"] | {"processes": 2}}))
    with pytest.raises(ValueError, match=r"\(processes was 2, is 1\): continue it as it was begun, use another"):
        main([run])
    # What had not come to a checkpoint yet starts anew.
    shutil.rmtree(tmp_path / "draft" / "checkpoint-1")
    main([run])
    assert json.loads(record.read_text())["conditions"]["processes"] == 1


def test_options_that_were_refused_leave_no_run_behind(saved_target, tmp_path):
    run = write_run(tmp_path, saved_target, max_steps=1)
    with pytest.raises(ValueError, match="None of 12 rows holds an assistant token"):
        main([run, "--max_length=2"])
    main([run])
    assert (tmp_path / "draft" / "model.safetensors").exists()


def test_unquoted_no_reaches_the_run(saved_target, tmp_path, monkeypatch):
    run = write_run(tmp_path, saved_target, max_steps=1, eval_rows=0, save_strategy=False)
    Path(run).write_text(Path(run).read_text() + "include_num_input_tokens_seen: no\n")
    arguments = []
    monkeypatch.setattr("transformers_confu.training.train.run", lambda *given: arguments.append(given[-1]))
    main([run])
    assert arguments[0].include_num_input_tokens_seen == "no" and arguments[0].save_strategy == "no"
