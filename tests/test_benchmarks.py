"""The benchmark for a GPU runs on a CPU with tiny models, and measures what it says."""

import json
import runpy
from pathlib import Path

import torch

from transformers_confu import confu_generation_config


BENCHMARK = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "gpu.py"))


def test_every_arm_is_measured(tmp_path, capsys):
    out = tmp_path / "gpu.jsonl"
    options = ["--device", "cpu", "--models", "tiny", "--sizes", "4", "--new_tokens", "9", "--repeats", "1"]
    BENCHMARK["main"]([*options, "--acceptance", "1", "--out", str(out)])
    lines = out.read_text(encoding="utf-8").splitlines()
    assert capsys.readouterr().out.splitlines() == lines
    records = [json.loads(line) for line in lines]
    kinds = [record["kind"] for record in records]
    assert kinds == ["environment"] + ["warm-up"] * 13 + ["speed"] * 7 + ["profile"] * 2
    assert all(record["same_texts"] == [1, 1] for record in records if record["kind"] == "warm-up")
    ours = ["N=4, C=0", "N=4, C=0, static", "N=4, C=4", "N=4, C=4, static"]
    speeds = {record["arm"]: record for record in records if record["kind"] == "speed"}
    assert set(speeds) == {"plain", "plain, static", "stock chain of 4", *ours}
    # Nine tokens: one from prefill, then two rounds of a chain of three and the target's own.
    assert [speeds[arm]["tau"] for arm in ours] == [4.0] * 4


def test_a_draft_that_is_never_right_gains_nothing():
    target, draft, [prompt] = BENCHMARK["counting"]("tiny", torch.float32, "cpu")
    config = confu_generation_config(target, confu_tree_size=6, max_new_tokens=9, do_sample=False)
    for probability, tau in ((0.0, 1.0), (1.0, 4.0)):
        with BENCHMARK["right_with"](probability, target.config.vocab_size):
            text = target.generate(prompt, assistant_model=draft, generation_config=config)
        assert text[0].tolist() == list(range(100, 237))
        assert draft.last_statistics.tau == tau
