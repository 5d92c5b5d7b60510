"""Benchmarks run on a CPU with tiny models, and measure what they say."""

import json
import runpy
from pathlib import Path

import torch
from transformers import DynamicCache

from helpers import make_tiny_target
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


def cache_of(target, text: torch.LongTensor) -> DynamicCache:
    return target(text, cache=DynamicCache(), use_cache=True).cache


@torch.no_grad()
def test_a_perfect_tree_holds_the_likeliest_paths_of_all():
    perfect_tree = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "perfect_draft.py"))["perfect_tree"]
    target = make_tiny_target()
    text = torch.randint(97, (1, 9), generator=torch.Generator().manual_seed(0))
    cache = cache_of(target, text[:, :5])
    tree = perfect_tree(target, text, cache, temperature=0.5, size=30, depth=2, branching=97)
    assert cache.get_seq_length() == 9 and tree.tokens[0, 0] == text[0, -1]
    first = (target(text).logits[0, -1] / 0.5).log_softmax(dim=-1)
    longer = torch.cat([text.expand(97, -1), torch.arange(97)[:, None]], dim=1)
    second = first[:, None] + (target(longer).logits[:, -1] / 0.5).log_softmax(dim=-1)
    best = torch.cat([first, second.flatten()]).sort(descending=True).values[:29]
    torch.testing.assert_close(tree.log_probs[0].sort(descending=True).values[1:], best.float(), rtol=1e-5, atol=1e-5)
    for node in range(1, 30):
        parent, token = tree.parents[0, node], tree.tokens[0, node]
        expected = first[token] if parent == 0 else second[tree.tokens[0, parent], token]
        torch.testing.assert_close(tree.log_probs[0, node], expected.float(), rtol=1e-5, atol=1e-5)
    # Three levels of two expanded nodes: 2, 4 and 4 candidates, all of them in the tree.
    tree = perfect_tree(target, text, cache_of(target, text[:, :5]), 0.5, size=11, depth=3, branching=2)
    assert tree.depths[0].tolist().count(3) == 4
    paths: list[list[int]] = [[]]
    for node in range(1, 11):
        paths.append(paths[tree.parents[0, node]] + [int(tree.tokens[0, node])])
        read = torch.cat([text, torch.tensor([paths[node]])], dim=1)
        scores = (target(read).logits[0, 8:-1] / 0.5).log_softmax(dim=-1)
        expected = sum(scores[place, token] for place, token in enumerate(paths[node]))
        torch.testing.assert_close(tree.log_probs[0, node], expected.float(), rtol=1e-5, atol=1e-5)
