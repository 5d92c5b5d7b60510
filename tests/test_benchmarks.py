"""Benchmarks run on a CPU with tiny models, and measure what they say."""

import json
import runpy
from pathlib import Path

import torch

from transformers_confu import confu_generation_config
from transformers_confu.inference.draft_tree import DraftTree
from transformers_confu.inference.round_costs import RoundCosts


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


def test_hindsight_takes_the_sizes_of_least_cost():
    oracle = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "oracle.py"))
    costs = RoundCosts((1, 2, 3), (1.0, 1.25, 2.0), (1,), (0.125,), step_seconds=1.0)
    # Below the root 7 and 8, below 7 again 8; the likelier come first: 7, then 8 below it.
    tree = DraftTree.from_parents(
        torch.tensor([[5, 7, 8, 8]]), torch.tensor([[0, 0, 0, 1]]), torch.tensor([[0.0, -0.1, -3.0, -0.2]])
    )
    rounds = oracle["possible_rounds"](tree, [7, 8, 9], costs)
    # A plain round drafts nothing; two nodes take one level, three take two; the last adds a row and no token.
    assert rounds == {1: (1, 1.0), 2: (2, 1.375), 3: (3, 2.25), 4: (3, 3.0)}
    assert oracle["possible_rounds"](tree, [8], costs)[4] == (1, 3.0)  # the text ends
    plain = {1: (1, 1.0)}
    assert oracle["best_steps"]([rounds, plain, plain]) == 2.25
    assert oracle["best_steps"]([rounds, plain, plain, plain]) == 3.25
    assert oracle["fixed_steps"]([rounds, plain, plain], 2) == 2.375
