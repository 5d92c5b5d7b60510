"""Every example runs, with tiny models; in this process, since each start of Python would import torch again."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from transformers_confu import ConFuDraftModel


EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run_example(monkeypatch, capsys):
    """Factory: run `examples/<name>.py --tiny` with further arguments; what it prints."""
    monkeypatch.syspath_prepend(EXAMPLES)  # where Python looks first when it starts a script from there

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--tiny", *arguments])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_generate(run_example):
    printed = run_example("generate")
    assert "draft state new" in printed
    assert "custom_generate gives the same text: True" in printed


def test_streaming(run_example):
    assert "draft state new" in run_example("streaming")


def test_use_pipeline(run_example):
    assert "draft state new" in run_example("use_pipeline")


def test_chat_carries_the_cache_and_the_drafts_state_from_turn_to_turn(run_example):
    printed = run_example("chat")
    assert printed.count("draft state new") == 1
    assert printed.count("draft state carried") == 2


def test_finetune_trains_and_saves_a_draft_that_decodes(run_example, tmp_path):
    printed = run_example("finetune", "--output", str(tmp_path))
    assert "answers written: 10" in printed
    assert (tmp_path / "draft" / "model.safetensors").is_file()
    assert "draft state new" in printed


def test_foresight_is_told_by_position(run_example, tmp_path):
    rows = [{"prompt": f"question {number}", "answer": "answer " * 12} for number in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    printed = run_example(
        "foresight", "--data", str(tmp_path / "rows.jsonl"), "--length", "300", "--conversations", "2"
    )
    assert re.search(r"accuracy_to_256: \d+\.\d%\n  accuracy_to_1024: \d+\.\d%\n", printed)
    assert "accuracy_to_4096" not in printed


def test_anchors_take_less_memory_than_a_contemplate_row_behind_every_token(run_example):
    printed = run_example("benchmark_anchors", "--lengths", "48", "--repeats", "1")
    cells = printed.splitlines()[-1].strip("| ").split(" | ")
    length, anchors, memory, memory_of_all = map(float, cells[:4])
    assert length == 48 and 9 <= anchors < 16
    assert 0 < memory < memory_of_all


def test_continuous_batches_give_the_answers_of_plain_generate(run_example, tmp_path):
    rows = [{"prompt": "question " + "?" * number} for number in range(9)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ("--num_prompts", "7", "--batch_size", "3", "--max_new_tokens", "40", "--rounds", "2")
    printed = run_example("benchmark_regeneration", "--prompts", str(tmp_path / "rows.jsonl"), *options)
    assert "7 prompts; equal answers: 7\n" in printed
    assert len(set(re.findall(r"(\d+) tokens, ", printed))) == 1  # counted alike in both rounds of both arms


def test_what_f_adds_is_counted(run_example, tmp_path):
    rows = [{"prompt": f"question {number}", "answer_ids": [5, 6, 7, 8] * 5} for number in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    printed = run_example("what_f_adds", "--data", str(tmp_path / "rows.jsonl"), "--rows", "2")
    # A draft row needs two answer tokens behind it: 19 of an answer of 20.
    assert "positions: 38, of 2 rows" in printed
    assert re.search(r"contemplate row right where the draft is wrong: \d+\.\d%", printed)

    # Drafts may also be named; these are the same.
    from _targets import load_draft, load_target

    draft = str(tmp_path / "draft")
    load_draft(load_target(tiny=True)[0], tiny=True).save_pretrained(draft)
    arguments = (draft, "--contemplation", draft, "--data", str(tmp_path / "rows.jsonl"), "--rows", "2")
    assert run_example("what_f_adds", *arguments) == printed


def test_mixtures_are_folded_into_the_mean_of_what_they_give(run_example, tmp_path):
    rows = [{"prompt": f"question {number}", "answer_ids": [5, 6, 7, 8] * 5} for number in range(2)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    from _targets import load_draft, load_target

    draft = load_draft(load_target(tiny=True)[0], tiny=True)
    mixtures = {name: draft.future_channel.get_submodule(name) for name in ("contemplate_token", "future_token")}
    for mixture in mixtures.values():
        torch.nn.init.zeros_(mixture.router.weight)  # whatever it reads, it gives the same
    draft.save_pretrained(tmp_path / "draft")
    folders = (str(tmp_path / "draft"), str(tmp_path / "folded"))
    printed = run_example("fold_mixtures", *folders, "--data", str(tmp_path / "rows.jsonl"))
    assert "future_token: the mean of 38 embeddings" in printed  # a draft row needs two answer tokens behind it

    folded = ConFuDraftModel.from_pretrained(tmp_path / "folded")
    assert (folded.config.num_contemplate_experts, folded.config.num_future_experts) == (1, 1)
    for name, mixture in mixtures.items():
        inputs = torch.randn(3, mixture.router.in_features)
        torch.testing.assert_close(folded.future_channel.get_submodule(name)(inputs), mixture(inputs))
    for name, parameter in folded.named_parameters():
        if not name.endswith(("router.weight", "experts")):
            assert torch.equal(parameter, draft.get_parameter(name)), name


def test_forms_of_f_share_core_and_contemplation(run_example, tmp_path):
    rows = [{"prompt": f"question {number}", "answer_ids": [5, 6, 7, 8] * 12} for number in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    output = tmp_path / "forms"
    options = ("--data", str(tmp_path / "rows.jsonl"), "--output", str(output), "--steps", "2", "--eval_rows", "4")
    printed = run_example("forms_of_f", *options, "--tokens_per_batch", "200", "--seeds", "3")
    cells = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    assert len(cells) == 2 + 9 and {row[1] for row in cells[2:]} == {"1"}

    from _targets import load_draft, load_target

    target, _ = load_target(tiny=True)
    base = load_draft(target, tiny=True)
    checkpoints = [output / f"form{number}_seed3" / "checkpoint-2" for number in range(9)]
    drafts = [ConFuDraftModel.from_pretrained(checkpoint) for checkpoint in checkpoints]
    assert drafts[1].config.future_hidden_state_indices == [4]
    assert drafts[4].future_channel.future_residual is None
    for draft in drafts:
        for name, tensor in draft.state_dict().items():
            if not name.startswith("future_channel.future"):
                assert torch.equal(tensor, base.state_dict()[name]), name
    assert not torch.equal(
        drafts[0].future_channel.future_projection.weight, base.future_channel.future_projection.weight
    )

    # What is finished is not repeated, and the gain is the difference from the same draft without f.
    for name, tau in (("without", 2.0), ("form0_seed3/measured", 2.125), ("form0_seed4/measured", 1.75)):
        (output / name).parent.mkdir(exist_ok=True)
        (output / f"{name}.json").write_text(json.dumps({"whole": tau, "first": tau + 1}))
    printed = run_example("forms_of_f", *options, "--forms", "0", "--seeds", "3", "4")
    assert "| without f: tau_greedy | | 2.000 | 3.000 |\n| as it is | 2 | +0.125, -0.250 | +0.125, -0.250 |" in printed


def test_forms_of_f_read_what_they_say(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    example = runpy.run_path(str(EXAMPLES / "forms_of_f.py"))
    from _targets import load_draft, load_target

    # Two answers, of 50 and 3 tokens: rows start at the last token of a prompt and end 2 before an answer's end.
    labels = torch.full((1, 70), -100)
    labels[0, 5:55] = 7
    labels[0, 60:63] = 7
    first = example["first_rows"](labels)
    assert first[0].nonzero()[:, 0].tolist() == [*range(4, 4 + 32), 59, 60]
    kept = torch.tensor(example["without_later_rows"]({"labels": labels[0].tolist()})["labels"])
    assert (kept != -100).nonzero()[:, 0].tolist() == [*range(5, 38), 60, 61, 62]

    # The embedding of the token that the final state says, in place of what the mixture gives.
    target, _ = load_target(tiny=True)
    base = load_draft(target, tiny=True)
    draft = example["PredictedTokenDraft"](base.config, target)
    draft.load_state_dict(base.state_dict())
    futures, taps = torch.randn(1, 3, base.config.future_size), torch.randn(1, 3, base.config.hidden_size)
    tokens = (futures[..., -32:] @ target.lm_head.weight.T).argmax(dim=-1)
    monkeypatch.setattr(base.future_channel.future_token, "forward", lambda _: target.get_input_embeddings()(tokens))
    ours, expected = draft.future(futures, taps), base.future(futures, taps)
    for name in ("key", "value", "residual"):
        torch.testing.assert_close(getattr(ours, name), getattr(expected, name))


def test_every_example_is_tested():
    names = {path.stem for path in EXAMPLES.glob("*.py") if not path.stem.startswith("_")}
    here = {
        "generate",
        "streaming",
        "use_pipeline",
        "chat",
        "finetune",
        "foresight",
        "forms_of_f",
        "what_f_adds",
        "fold_mixtures",
        "benchmark_anchors",
        "benchmark_regeneration",
    }
    # In `training/test_prompts.py` and `training/test_training_examples.py`.
    elsewhere = {"prepare_prompts", "benchmark_training", "training_curves", "vocabulary_coverage"}
    assert names == here | elsewhere
