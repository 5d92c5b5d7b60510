"""The training command: one run or stages, from files and options; skipped, continued or refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import TrainerCallback

from commands import weights_of, write_run
from helpers import make_tiny_target
from transformers_confu import ConFuDraftModel
from transformers_confu.common.option_files import read_option_file
from transformers_confu.inference.knobs import ConFuKnobs
from transformers_confu.training import ConFuTrainer
from transformers_confu.training.train import load_target_once, main


def test_the_command_trains_a_new_draft_and_continues_it(saved_target, tmp_path, capsys):
    main([write_run(tmp_path, saved_target)])
    printed = capsys.readouterr().out
    assert "rows: 12 kept of 12" in printed and "Draft vocabulary: 50 tokens" in printed
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


def test_the_command_can_hold_out_nothing(saved_target, tmp_path, capsys):
    main([write_run(tmp_path, saved_target, eval_rows=0, max_steps=1, num_soft_prompts=0)])
    assert "eval_" not in capsys.readouterr().out
    assert (tmp_path / "draft" / "model.safetensors").exists()


def test_the_command_takes_options_too(saved_target, tmp_path):
    write_run(tmp_path, saved_target)
    options = yaml.safe_load((tmp_path / "run.yaml").read_text()) | {"max_steps": 1}
    arguments = []
    for name, value in options.items():
        arguments += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
    main(arguments)
    assert (tmp_path / "draft" / "model.safetensors").exists()


def test_ablations_are_options(saved_target, tmp_path):
    run = write_run(tmp_path, saved_target, max_steps=1)
    main([run])
    ablations = ["--num_experts=1", "--num_soft_prompts", "3", "--instruction=", "--rotate_soft_prompts=true"]
    main([run, *ablations, f"--output_dir={tmp_path / 'second'}"])
    first, second = (ConFuDraftModel.from_pretrained(tmp_path / name) for name in ("draft", "second"))
    assert first.config.num_contemplate_experts == first.config.num_future_experts == 8
    assert second.config.num_contemplate_experts == second.config.num_future_experts == 1
    assert second.config.num_future_experts_per_token == 1
    assert not first.config.rotate_soft_prompts and second.config.rotate_soft_prompts
    # Keys of a text are far larger than random ones.
    assert second.future_channel.soft_prompts.std() < 0.1 * first.future_channel.soft_prompts.std()


def test_a_draft_keeps_its_form(saved_target, tmp_path):
    run = write_run(tmp_path, saved_target, max_steps=1)
    main([run])
    again = [run, "--draft", str(tmp_path / "draft"), "--output_dir", str(tmp_path / "second")]
    for option, value, has in (
        ("num_experts", 1, 8),
        ("num_soft_prompts", 0, 5),
        ("rotate_soft_prompts", True, False),
        ("draft_vocab_size", 20, 50),
    ):
        with pytest.raises(
            ValueError, match=rf"`{option}` is {value}, and .*draft, the .* from, has {has}: it is an opt"
        ):
            main([*again, f"--{option}={value}"])
    main([*again, "--num_experts=8", "--rotate_soft_prompts=false"])  # as it is
    recipes = [json.loads((tmp_path / name / "_run.json").read_text())["recipe"] for name in ("draft", "second")]
    assert (recipes[0]["num_experts"], recipes[0]["num_soft_prompts"]) == (8, 5)
    assert "num_experts" not in recipes[1]


def test_stages_may_differ_in_precision_and_in_what_is_frozen(saved_target, tmp_path):
    stages = [
        {"stage": "core", "max_steps": 3, "bf16": True, "frozen": []},
        {"stage": "joint", "max_steps": 3, "bf16": False},
        {"stage": "joint", "max_steps": 3, "bf16": True, "output_dir": str(tmp_path / "last")},
    ]
    precisions = []
    with pytest.MonkeyPatch.context() as patch:
        train = ConFuTrainer.train

        def record(self, *args, **kwargs):
            precisions.append(self.accelerator.mixed_precision)
            return train(self, *args, **kwargs)

        patch.setattr(ConFuTrainer, "train", record)
        main([write_run(tmp_path, saved_target, stages=stages, frozen=["core"], output_dir=str(tmp_path / "runs"))])
    assert precisions == ["bf16", "no", "bf16"]
    core, joint, last = (weights_of(tmp_path / name) for name in ("runs/core", "runs/joint", "last"))
    assert torch.equal(core["fc.weight"], joint["fc.weight"]) and torch.equal(joint["fc.weight"], last["fc.weight"])
    assert not torch.equal(
        joint["future_channel.future_projection.weight"], last["future_channel.future_projection.weight"]
    )


def test_evaluation_decodes_held_out_prompts(saved_target, tmp_path):
    options = {"decoding_prompts": 2, "decoding_tokens": 8, "decoding_knobs": {"confu_tree_size": 4}}
    metrics = []
    with pytest.MonkeyPatch.context() as patch:
        evaluate = ConFuTrainer.evaluate
        patch.setattr(ConFuTrainer, "evaluate", lambda self: metrics.append(evaluate(self)))
        main([write_run(tmp_path, saved_target, max_steps=1, stage="core", **options)])
    assert metrics[0]["eval_decoding_mismatches"] == 0 and metrics[0]["eval_decoding_tau"] >= 1


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


def test_a_last_evaluation_that_fails_does_not_cost_the_training(saved_target, tmp_path, monkeypatch):
    monkeypatch.setattr(ConFuTrainer, "evaluate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        main([write_run(tmp_path, saved_target, max_steps=1)])
    assert ConFuDraftModel.from_pretrained(tmp_path / "draft").generation_config.confu_depth == 2


def test_a_target_to_be_sharded_is_not_one_that_stays_whole(saved_target):
    named = (str(saved_target), "float32", torch.device("cpu"), "null")
    whole = load_target_once(*named)
    assert load_target_once(*named) is whole
    sharded = load_target_once(*named, sharded=True)  # in place, once a trainer has it
    assert sharded[0] is not whole[0] and load_target_once(*named)[0] is not sharded[0]


# Stages


STAGES = [
    {"stage": "core", "max_steps": 3},
    {"stage": "warm_up", "max_steps": 4, "learning_rate": "1e-2"},
    {"stage": "joint", "max_steps": 3},
]


def test_three_stages_follow_from_each_other(saved_target, tmp_path, capsys):
    stages = [*STAGES[:2], STAGES[2] | {"ttt_steps": 3}]
    run = write_run(tmp_path, saved_target, stages=stages, output_dir=str(tmp_path / "runs"))
    main([run])
    core, warm_up, joint = (weights_of(tmp_path / "runs" / name) for name in ("core", "warm_up", "joint"))
    for name in core:
        is_of_warm_up = name.startswith(("future_channel.soft_prompts", "future_channel.contemplate_token."))
        assert torch.equal(core[name], warm_up[name]) != is_of_warm_up, name
        assert torch.equal(warm_up[name], joint[name]) == (name in ("d2t", "t2d")), name
    # Each decodes by what it was trained for: no future of an untrained channel, no deeper than its steps.
    drafts = [ConFuDraftModel.from_pretrained(tmp_path / "runs" / name) for name in ("core", "warm_up", "joint")]
    assert [ConFuKnobs.of(draft.generation_config) for draft in drafts] == [
        {"confu_contemplation": 0, "confu_depth": 2},
        {"confu_depth": 2},
        {"confu_depth": 3},
    ]

    capsys.readouterr()
    before = (tmp_path / "runs" / "joint" / "model.safetensors").stat().st_mtime_ns
    main([run])
    printed = capsys.readouterr().out
    for stage in ("core", "warm_up", "joint"):
        assert f"Stage {stage}: finished, in {tmp_path / 'runs' / stage}" in printed
    assert (tmp_path / "runs" / "joint" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("stage, step", [("core", 1), ("warm_up", 3), ("joint", 2)])
def test_an_interrupted_stage_is_continued(saved_target, tmp_path, capsys, stage, step):
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
    (tmp_path / "runs" / "joint" / "_run.json").write_text(json.dumps({"finished": True, "recipe": {"seed": 1}}))
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
    checkpoint = (tmp_path / "draft" / "checkpoint-1").rename(tmp_path / "checkpoint")
    main([run])
    assert json.loads(record.read_text())["conditions"]["processes"] == 1
    shutil.rmtree(tmp_path / "draft" / "checkpoint-1")
    checkpoint.rename(tmp_path / "draft" / "checkpoint-1")
    # A record of an older version says nothing of it.
    del interrupted["conditions"]
    record.write_text(json.dumps(interrupted))
    main([run])
    assert json.loads(record.read_text())["finished"]


def test_an_option_that_a_record_does_not_know_was_off(saved_target, tmp_path, capsys):
    """Runs of older versions stay finished, and can be continued."""
    run = write_run(tmp_path, saved_target, max_steps=1)
    main([run])
    record = tmp_path / "draft" / "_run.json"
    settings = json.loads(record.read_text())
    del settings["recipe"]["rotate_soft_prompts"]
    record.write_text(json.dumps(settings))
    main([run])
    assert "Stage joint: finished" in capsys.readouterr().out
    with pytest.raises(ValueError, match="rotate_soft_prompts was None, is True"):
        main([run, "--rotate_soft_prompts=true"])


def test_options_that_were_refused_leave_no_run_behind(saved_target, tmp_path):
    run = write_run(tmp_path, saved_target, max_steps=1)
    with pytest.raises(ValueError, match="None of 12 rows can be trained on"):
        main([run, "--max_length=2"])
    main([run])
    assert (tmp_path / "draft" / "model.safetensors").exists()


# Reading


TYPES = {
    **dict.fromkeys(("target", "draft", "output_dir", "stage", "resume_from_checkpoint", "save_strategy"), str),
    **{"max_steps": int, "learning_rate": float, "data": list[str], "knobs": dict | str, "use_cpu": bool},
    "report_to": str | list[str],
}


def read(folder: Path, text: str, *options: str) -> list[list[str]]:
    (folder / "run.yaml").write_text(text)
    return read_option_file([str(folder / "run.yaml"), *options], TYPES)


def test_options_alone_are_one_run():
    assert read_option_file(["--max_steps", "3"], TYPES) == [["--max_steps", "3"]]
    assert read_option_file([], TYPES) == [[]]


def test_a_file_becomes_options(tmp_path):
    text = "learning_rate: 1e-4\ndata: [a, b]\ndraft: null\nknobs: {x: 1}\nmax_steps: 3"
    assert read(tmp_path, text, "--max_steps", "5") == [
        ["--learning_rate=1e-4", "--data", "a", "b", '--knobs={"x": 1}', "--max_steps=3", "--max_steps", "5"]
    ]


def test_yaml_and_command_line_mean_the_same(tmp_path):
    text = "save_strategy: no\nuse_cpu: no\ndata: []\nreport_to: [tensorboard, wandb]"
    assert read(tmp_path, text) == [["--save_strategy=no", "--use_cpu=False", "--report_to=tensorboard,wandb"]]


def test_unquoted_no_and_lists_of_trackers_reach_the_run(saved_target, tmp_path):
    run = write_run(tmp_path, saved_target, max_steps=1, eval_rows=0, save_strategy=False)
    text = Path(run).read_text().replace("report_to: none", "report_to: [tensorboard, wandb]")
    Path(run).write_text(text + "include_num_input_tokens_seen: no\n")
    with pytest.MonkeyPatch.context() as patch:
        arguments = []
        patch.setattr("transformers_confu.training.train.run", lambda *given: arguments.append(given[-1]))
        main([run])
    assert arguments[0].report_to == ["tensorboard", "wandb"]
    assert arguments[0].include_num_input_tokens_seen == "no" and arguments[0].save_strategy == "no"


def test_stages_share_what_they_do_not_override(tmp_path):
    text = """
        output_dir: runs
        learning_rate: 1
        draft: first
        stages:
          - {stage: core}
          - {stage: joint, learning_rate: 2}
          - {stage: joint, output_dir: last, draft: runs/core}
    """
    core, joint, last = (
        dict(option.removeprefix("--").split("=") for option in run) for run in read(tmp_path, text, "--max_steps=5")
    )
    assert core == {
        "output_dir": "runs/core",
        "learning_rate": "1",
        "draft": "first",
        "stage": "core",
        "max_steps": "5",
    }
    assert joint == core | {"output_dir": "runs/joint", "learning_rate": "2", "draft": "runs/core", "stage": "joint"}
    assert last == core | {"output_dir": "last", "draft": "runs/core", "stage": "joint"}
    assert "--output_dir=other/core" in read(tmp_path, text, "--output_dir", "other")[0]


def test_a_draft_of_the_command_line_is_that_of_the_first_stage(tmp_path):
    for own in ("", ", draft: own"):
        text = f"output_dir: runs\ndraft: first\nstages: [{{stage: core{own}}}, {{stage: warm_up}}, {{stage: joint}}]"
        runs = read(tmp_path, text, "--draft", "other", "--max_steps=5")
        drafts = [[option for option in run if option.startswith("--draft")] for run in runs]
        assert drafts == [["--draft=other"], ["--draft=runs/core"], ["--draft=runs/warm_up"]]
        assert all(run[-1] == "--max_steps=5" for run in runs)


def test_a_checkpoint_is_of_one_stage(tmp_path):
    text = "output_dir: runs\nstages: [{stage: core, resume_from_checkpoint: own}, {stage: joint}]"
    assert ["--resume_from_checkpoint=own" in run for run in read(tmp_path, text)] == [True, False]
    message = "`resume_from_checkpoint=c` would hold for every stage of .*run.yaml; leave it out, as each continues"
    for common, options in (
        ("resume_from_checkpoint: c", []),
        ("", ["--resume_from_checkpoint=c"]),
        ("", ["--resume-from-checkpoint", "c"]),
    ):
        with pytest.raises(ValueError, match=message):
            read(tmp_path, f"{text}\n{common}", *options)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "run.yaml holds no options; write one `name: value` a line."),
        ("max_step: 3", "run.yaml: no option is called `max_step`; did you mean `max_steps`?"),
        ("output_dir: a\nstages: [{stage: core, lerning_rate: 1}]", "did you mean `learning_rate`?"),
        (
            "output_dir: a\nstages: [core]",
            "`stages` of {path} must be a list of mappings, each with at least a `stage`.",
        ),
        (
            "stages: [{stage: core}]",
            "{path} has stages and no `output_dir`; name the folder that theirs shall lie in.",
        ),
        ("output_dir: a\nstages: [{stage: joint}, {stage: joint}]", "Two stages of {path} write to a/joint; give one"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, message):
    with pytest.raises(ValueError) as error:
        read(tmp_path, text)
    assert message.format(path=tmp_path / "run.yaml") in str(error.value)
