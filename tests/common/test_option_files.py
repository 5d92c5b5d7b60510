"""Options of commands from a YAML file."""

from pathlib import Path

import pytest

from transformers_confu.common.files import read_json
from transformers_confu.common.option_files import read_option_file


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    """Editors on Windows write one."""
    (tmp_path / "run.yaml").write_text("number: 4\n", encoding="utf-8-sig")
    assert read_option_file([str(tmp_path / "run.yaml"), "--name=x"], {"number": int}) == [["--number=4", "--name=x"]]
    (tmp_path / "state.json").write_text('{"a": 1}', encoding="utf-8-sig")
    assert read_json(tmp_path / "state.json") == {"a": 1}


TYPES = {
    **dict.fromkeys(("target", "draft", "output_dir", "stage", "resume_from_checkpoint", "save_strategy"), str),
    **{"max_steps": int, "learning_rate": float, "data": list[str], "knobs": dict | str, "use_cpu": bool},
    "report_to": str | list[str],
}


def read(folder: Path, text: str, *options: str) -> list[list[str]]:
    (folder / "run.yaml").write_text(text)
    return read_option_file([str(folder / "run.yaml"), *options], TYPES)


def test_a_file_becomes_options_and_yaml_means_what_the_command_line_does(tmp_path):
    text = "learning_rate: 1e-4\ndata: [a, b]\ndraft: null\nknobs: {x: 1}\nmax_steps: 3\n"
    text += "save_strategy: no\nuse_cpu: no"
    expected = ["--learning_rate=1e-4", "--data", "a", "b", '--knobs={"x": 1}', "--max_steps=3"]
    expected += ["--save_strategy=no", "--use_cpu=False"]
    assert read(tmp_path, text, "--max_steps", "5") == [[*expected, "--max_steps", "5"]]
    assert read(tmp_path, "data: []\nreport_to: [tensorboard, wandb]") == [["--report_to=tensorboard,wandb"]]


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
        **{"output_dir": "runs/core", "learning_rate": "1", "draft": "first", "stage": "core"},
        "max_steps": "5",
    }
    assert joint == core | {"output_dir": "runs/joint", "learning_rate": "2", "draft": "runs/core", "stage": "joint"}
    assert last == core | {"output_dir": "last", "draft": "runs/core", "stage": "joint"}
    assert "--output_dir=other/core" in read(tmp_path, text, "--output_dir", "other")[0]


def test_a_draft_of_the_command_line_is_that_of_the_first_stage(tmp_path):
    for own in ("", ", draft: own"):
        stages = f"stages: [{{stage: core{own}}}, {{stage: contemplation}}, {{stage: joint}}]"
        text = f"output_dir: runs\ndraft: first\n{stages}"
        runs = read(tmp_path, text, "--draft", "other", "--max_steps=5")
        drafts = [[option for option in run if option.startswith("--draft")] for run in runs]
        assert drafts == [["--draft=other"], ["--draft=runs/core"], ["--draft=runs/contemplation"]]
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
        ("output_dir: a\nstages: [core]", "`stages` of {path} must be a list of mappings, each with at least a `st"),
        ("stages: [{stage: core}]", "{path} has stages and no `output_dir`; name the folder that theirs shall lie"),
        ("output_dir: a\nstages: [{stage: joint}, {stage: joint}]", "Two stages of {path} write to a/joint; give one"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, message):
    with pytest.raises(ValueError) as error:
        read(tmp_path, text)
    assert message.format(path=tmp_path / "run.yaml") in str(error.value)
