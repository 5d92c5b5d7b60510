"""
How far automatic rounds are from the best size of every round in hindsight, by costs and not by a clock.

Plain greedy decoding of each question, where a tree of 64 nodes is drafted at every token. The text tells which of its
nodes would have been accepted, so for every place and size the tokens of a round and its cost are known, and the
cheapest series of rounds is a shortest way through the text. Against it: automatic rounds, and the best fixed size of
all. Costs are those of a table, in steps (a plain forward over one row).

    python benchmarks/oracle.py questions.jsonl --num_per_group 2
"""

import argparse
from collections import Counter
from typing import Any
from unittest import mock

import torch

from transformers_confu.common.loading import default_draft, load_decoding_draft, load_target
from transformers_confu.evaluation.questions import load_questions, stratified
from transformers_confu.inference import decoding
from transformers_confu.inference.candidate_generator_confu import ConFuCandidateGenerator
from transformers_confu.inference.draft_tree import DraftTree
from transformers_confu.inference.knobs import ConFuKnobs
from transformers_confu.inference.round_costs import DRAFT_ROWS, TARGET_ROWS, RoundCosts
from transformers_confu.inference.rounds import AutomaticRounds, FixedRounds


# Measured on server CPUs with SmolLM2-135M and its draft.
TABLES = {
    "bf16": RoundCosts(TARGET_ROWS, (1.0, 1.02, 1.05, 1.13, 1.27, 1.65, 2.4), DRAFT_ROWS, (0.05, 0.05, 0.07), 0.04),
    "fp32": RoundCosts(TARGET_ROWS, (1.0, 1.33, 1.33, 1.4, 1.8, 2.4, 3.6), DRAFT_ROWS, (0.05, 0.05, 0.06), 0.04),
}
WHOLE = ConFuKnobs(AutomaticRounds.MAX_NODES, AutomaticRounds.MAX_DEPTH, AutomaticRounds.branching, contemplation=0)


def possible_rounds(tree: DraftTree, tokens: list[int], costs: RoundCosts) -> dict[int, tuple[int, float]]:
    """
    Size of a tree -> tokens and steps of its round, where the text goes on with `tokens`; only draft rows with a child
    in the tree cost.
    """
    children, path = tree.children()[0], [0]
    while len(path) <= len(tokens) and (child := children.get((path[-1], tokens[len(path) - 1]))) is not None:
        path.append(child)
    order = [0, *(1 + tree.log_probs[0, 1:].sort(descending=True, stable=True).indices).tolist()]
    parents, depths = tree.parents[0].tolist(), tree.depths[0].tolist()
    rounds, expanded = {1: (1, 1.0)}, set()
    for size, node in enumerate(order[1:], start=2):
        expanded.add(parents[node])
        by_level = Counter(depths[parent] for parent in expanded)
        emitted = min(1 + sum(other in path[1:] for other in order[:size]), len(tokens))
        rounds[size] = emitted, costs.target(size) + sum(map(costs.draft, by_level.values()))
    return rounds


def best_steps(rounds: list[dict[int, tuple[int, float]]]) -> float:
    """Steps of the cheapest series of rounds through a text; `rounds` at each of its places."""
    ahead = [0.0] * (len(rounds) + 1)
    for place in reversed(range(len(rounds))):
        ahead[place] = min(steps + ahead[place + emitted] for emitted, steps in rounds[place].values())
    return ahead[0]


def fixed_steps(rounds: list[dict[int, tuple[int, float]]], size: int) -> float:
    """Steps of rounds of one size."""
    place, total = 0, 0.0
    while place < len(rounds):
        emitted, steps = rounds[place].get(size) or rounds[place][max(rounds[place])]
        place, total = place + emitted, total + steps
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description="Automatic rounds against the best sizes in hindsight.")
    parser.add_argument("questions", help="as of `confu evaluate`; the first turns are asked")
    parser.add_argument("--num_per_group", type=int)
    options = parser.parse_args()
    target, tokenizer = load_target("demo", torch.float32, "cpu")
    draft = load_decoding_draft(default_draft(), target)
    draft.generation_config.confu_lookup = False  # of what the draft says alone
    propose, trees, kept = ConFuCandidateGenerator.propose, [], []

    def plainly(self: Any, root_tokens: Any, rounds: Any, *others: Any) -> DraftTree:
        trees.append(propose(self, root_tokens, FixedRounds(WHOLE), *others))
        rounds.tree_size(None)
        return DraftTree.root_only(root_tokens)

    class Kept(AutomaticRounds):
        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            kept.append(self)

    rates: dict[str, list[list[float]]] = {name: [] for name in TABLES}
    for question in stratified(load_questions(options.questions), options.num_per_group):
        message = [{"role": "user", "content": question.turns[0]}]
        prompt = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        call = dict(**prompt, assistant_model=draft, max_new_tokens=64, do_sample=False)
        trees.clear()
        with mock.patch.object(ConFuCandidateGenerator, "propose", plainly):
            text = target.generate(**call)[0, prompt["input_ids"].shape[1] :].tolist()
        for name, table in TABLES.items():
            places = [possible_rounds(tree, text[place + 1 :], table) for place, tree in enumerate(trees)]
            with (
                mock.patch.object(decoding, "round_costs", lambda *_, table=table: table),
                mock.patch.object(decoding, "AutomaticRounds", Kept),
            ):
                target.generate(**call)
            spent = kept[-1].spent - kept[-1].PRIOR_WEIGHT
            written = kept[-1].tokens - kept[-1].PRIOR_WEIGHT
            fixed = {size: len(places) / fixed_steps(places, size) for size in (4, 6, 8, 12, 16, 24, 32)}
            rates[name].append([written / spent, len(places) / best_steps(places), *fixed.values()])
            print(question.id, question.group, name, " ".join(f"{rate:.2f}" for rate in rates[name][-1]), flush=True)
    for name, rows in rates.items():
        automatic, best, *fixed = (sum(column) / len(rows) for column in zip(*rows, strict=True))
        print(
            f"{name}: tokens per step, mean of {len(rows)} questions: automatic {automatic:.2f}, best fixed size "
            f"{max(fixed):.2f}, in hindsight {best:.2f}, of which automatic rounds reach {automatic / best:.2f}"
        )


if __name__ == "__main__":
    main()
