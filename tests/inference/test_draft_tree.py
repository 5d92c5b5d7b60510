"""The draft tree against searches written naively in Python, on trees that hypothesis makes hard."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from transformers_confu.inference.draft_tree import DraftTree, TreeGrower, ancestor_closure
from transformers_confu.inference.knobs import ConFuKnobs
from transformers_confu.inference.rounds import FixedRounds


@dataclass(frozen=True)
class Draft:
    """A deterministic stand-in for a draft: log-probabilities of the next draft token, given a path of them."""

    seed: int
    vocab_size: int
    style: str

    def __call__(self, path: tuple[int, ...]) -> torch.Tensor:
        random = np.random.default_rng([self.seed, len(path), *path])
        logits = random.normal(size=self.vocab_size)
        if self.style == "peaked":
            logits *= 40  # most probabilities underflow and the best one rounds to 1: a child ties with its parent
        elif self.style == "ties":
            logits = random.integers(0, 2, size=self.vocab_size).astype(float)
        elif self.style == "impossible":
            logits[random.random(self.vocab_size) < 0.6] = -math.inf
            logits[random.integers(self.vocab_size)] = 0.0
        elif self.style == "nan" and random.random() < 0.4:
            logits[:] = math.nan  # a forward that overflowed
        return torch.tensor(logits, dtype=torch.float32).log_softmax(-1)


SMOOTH = ["gaussian"]
STYLES = ["gaussian", "peaked", "ties", "impossible", "nan"]


def grow(drafts: list[Draft], branching: int, depth: int):
    """
    Drive a grower as the candidate generator does, one path of tokens per draft step and row.

    Returns:
        The grower and, per batch row and draft step, the paths of the frontier that this step expanded.
    """
    grower = TreeGrower(torch.stack([draft(()) for draft in drafts]), branching, torch.arange(drafts[0].vocab_size))
    paths = [[(int(token),) for token in row] for row in grower.frontier_tokens]
    steps = [[row] for row in paths]
    for _ in range(1, depth):
        grower.expand(torch.stack([torch.stack([d(p) for p in row]) for d, row in zip(drafts, paths, strict=True)]))
        paths = [
            [row[parent] + (token,) for parent, token in zip(parents, tokens, strict=True)]
            for row, parents, tokens in zip(
                paths, grower.frontier_parents.tolist(), grower.frontier_tokens.tolist(), strict=True
            )
        ]
        for step, row in zip(steps, paths, strict=True):
            step.append(row)
    return grower, steps


def path_of(tree: DraftTree, node: int, row: int = 0) -> tuple[int, ...]:
    """Tokens from below the root to `node`, by following `parents` one by one."""
    tokens = []
    while node != 0:
        assert tree.parents[row, node] < node
        tokens.append(int(tree.tokens[row, node]))
        node = int(tree.parents[row, node])
    return tuple(reversed(tokens))


def score_of(draft: Draft, path: tuple[int, ...]) -> np.float32:
    """Cumulative log-probability of `path` in float32; what is impossible or not a number is -inf."""
    score = np.float32(0)
    for length, token in enumerate(path):
        step = np.float32(draft(path[:length])[token])
        score = np.float32(score + (np.float32(-np.inf) if np.isnan(step) else step))
    return score


def eagle2(draft: Draft, branching: int, depth: int) -> dict[tuple[int, ...], np.float32]:
    """All candidates of EAGLE-2's expansion: the best `branching` nodes of each level get their best children."""
    branching = min(branching, draft.vocab_size)
    pool: dict[tuple[int, ...], np.float32] = {}
    frontier: list[tuple[int, ...]] = [()]
    for _ in range(depth):
        level = {}
        for path in frontier:
            best = sorted(range(draft.vocab_size), key=lambda token: -draft(path)[token])[:branching]  # noqa: B023
            level |= {path + (token,): score_of(draft, path + (token,)) for token in best}
        pool |= level
        frontier = sorted(level, key=level.__getitem__, reverse=True)[:branching]
    return pool


def shapes(styles: list[str]):
    """Strategy: a draft, branching, depth and tree size."""
    return st.tuples(
        st.builds(Draft, seed=st.integers(0, 10**6), vocab_size=st.integers(1, 6), style=st.sampled_from(styles)),
        st.integers(1, 5),
        st.integers(1, 5),
        st.integers(1, 40),
    )


def make_tree(shape) -> DraftTree:
    draft, branching, depth, tree_size = shape
    grower, _ = grow([draft], branching, depth)
    return grower.tree(torch.tensor([7]), tree_size)


@given(shapes(STYLES))
@settings(deadline=None, max_examples=150)
def test_every_kept_node_hangs_on_its_own_parent(shape):
    draft, branching, depth, tree_size = shape
    tree = make_tree(shape)
    assert tree.log_probs[0, 0] == 0 and tree.parents[0, 0] == 0 and tree.tokens[0, 0] == 7
    paths = [path_of(tree, node) for node in range(tree.size)]
    assert len(set(paths)) == tree.size  # no candidate twice, so no node took the place of another
    for node, path in enumerate(paths):
        # The score proves the parent: an orphan hung on another node would have a path of another score.
        expected = np.maximum(score_of(draft, path), np.finfo(np.float32).min)
        assert max(tree.log_probs[0, node].item(), np.finfo(np.float32).min) == expected
        assert tree.depths[0, node] == len(path) <= depth


@given(shapes(STYLES))
@settings(deadline=None, max_examples=150)
def test_the_tree_has_the_size_asked_for_or_all_candidates(shape):
    draft, branching, depth, tree_size = shape
    k = min(branching, draft.vocab_size)
    assert make_tree(shape).size == min(tree_size, 1 + k + (depth - 1) * k * k)


@given(shapes(SMOOTH))
@settings(deadline=None, max_examples=100)
def test_the_kept_nodes_are_the_best_of_eagle_2s_candidates(shape):
    draft, branching, depth, tree_size = shape
    pool = eagle2(draft, branching, depth)
    assume(len(set(pool.values())) == len(pool))  # without ties the rule leaves no choice
    best = sorted(pool, key=pool.__getitem__, reverse=True)[: tree_size - 1]
    tree = make_tree(shape)
    assert {path_of(tree, node) for node in range(1, tree.size)} == set(best)


@given(shapes(STYLES))
@settings(deadline=None, max_examples=60)
def test_the_mask_is_the_ancestor_closure(shape):
    tree = make_tree(shape)
    for node in range(tree.size):
        above, current = {node, 0}, node
        while current != 0:
            current = int(tree.parents[0, current])
            above.add(current)
        assert set(tree.ancestors[0, node].nonzero()[:, 0].tolist()) == above


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 9, 33, 70])
def test_the_closure_reaches_the_end_of_a_chain(size):
    chain = torch.arange(-1, size - 1).clamp(min=0)[None]
    assert torch.equal(ancestor_closure(chain)[0], torch.ones(size, size, dtype=torch.bool).tril())


@given(shapes(STYLES), st.integers(0, 10**6))
@settings(deadline=None, max_examples=60)
def test_a_walk_by_children_finds_what_a_search_finds(shape, seed):
    tree = make_tree(shape)
    children = tree.children()[0]
    assert len(children) == tree.size - 1
    random = np.random.default_rng(seed)
    node = 0
    while True:
        token = int(random.integers(shape[0].vocab_size))
        found = [
            child for child in range(1, tree.size) if tree.parents[0, child] == node and tree.tokens[0, child] == token
        ]
        assert len(found) <= 1 and children.get((node, token)) == (found[0] if found else None)
        if not found:
            return
        node = found[0]


@given(shapes(STYLES))
@settings(deadline=None, max_examples=80)
def test_nodes_that_cannot_enter_the_tree_are_not_expanded(shape):
    """Fixed rounds leave out what they may, and the tree is that of all nodes expanded."""
    draft, branching, depth, tree_size = shape
    rounds = FixedRounds(ConFuKnobs(tree_size=tree_size, depth=depth, branching=branching))
    grower = TreeGrower(draft(())[None], branching, torch.arange(draft.vocab_size))
    paths: list[tuple[int, ...]] = [()]
    for _ in range(1, rounds.depth(0, depth)):
        if (width := rounds.width(grower)) == 0:
            break
        grower.narrow(width)
        tokens, parents = grower.frontier_tokens[0].tolist(), grower.frontier_parents[0].tolist()
        paths = [paths[parent] + (token,) for parent, token in zip(parents, tokens, strict=True)]
        grower.expand(torch.stack([draft(path) for path in paths])[None])
    tree, whole = grower.tree(torch.tensor([7]), tree_size), make_tree(shape)
    for name in ("tokens", "parents", "log_probs"):
        assert torch.equal(getattr(tree, name), getattr(whole, name)), name


@given(shapes(STYLES))
@settings(deadline=None, max_examples=60)
def test_frontier_rows_see_the_rows_of_their_own_path(shape):
    draft, branching, depth, _ = shape
    grower, steps = grow([draft], branching, depth)
    rows = [path for step in steps[0] for path in step]
    for path, sees in zip(steps[0][-1], grower.frontier_ancestors[0], strict=True):
        own_path = {path[:length] for length in range(1, len(path) + 1)}
        assert [rows[row] in own_path for row in range(len(rows))] == sees.tolist()


def test_ties_keep_the_earlier_candidate():
    # Two certain tokens in a row, all else impossible: root - 0 - 0 - 0 all tie at log-probability 0.
    certain = torch.tensor([[0.0, -math.inf, -math.inf]])
    grower = TreeGrower(certain, 3, torch.arange(3))
    for _ in range(2):
        grower.expand(certain.expand(1, 3, 3))
    for tree_size, depths in ((2, [0, 1]), (3, [0, 1, 2]), (4, [0, 1, 2, 3])):
        tree = grower.tree(torch.tensor([0]), tree_size)
        assert tree.depths[0].tolist() == depths and tree.log_probs[0].tolist() == [0.0] * tree_size


def test_equal_scores_are_kept_in_the_order_they_were_found():
    # A row long enough that an unstable sort would shuffle it.
    flat = torch.zeros(1, 64)
    grower = TreeGrower(flat, 64, torch.arange(64))
    first = grower.frontier_tokens[0].tolist()
    grower.expand(flat.expand(1, 64, 64))
    assert (grower.frontier_parents == 0).all()  # the children of the first node come first
    tree = grower.tree(torch.tensor([0]), 50)
    assert tree.tokens[0, 1:].tolist() == first[:49] and (tree.depths[0, 1:] == 1).all()


@given(shapes(STYLES), st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_a_batch_of_two_is_two_batches_of_one(shape, other_seed):
    draft, branching, depth, tree_size = shape
    drafts = [draft, Draft(other_seed, draft.vocab_size, draft.style)]
    both = grow(drafts, branching, depth)[0].tree(torch.tensor([7, 8]), tree_size)
    num_rows = min(4, both.size)
    nodes = both.contemplated_nodes(num_rows)
    for row, single in enumerate(drafts):
        alone = grow([single], branching, depth)[0].tree(torch.tensor([7 + row]), tree_size)
        for name in ("tokens", "parents", "depths", "log_probs", "ancestors"):
            assert torch.equal(getattr(both, name)[row], getattr(alone, name)[0]), name
        assert both.children()[row] == alone.children()[0]
        assert torch.equal(nodes[row], alone.contemplated_nodes(num_rows)[0])
        assert torch.equal(both.contemplate_row_of(nodes)[row], alone.contemplate_row_of(nodes[row : row + 1])[0])


def test_draft_tokens_become_target_tokens():
    draft = Draft(3, 4, "gaussian")
    token_ids = torch.tensor([2, 11, 40, 96])
    log_probs = torch.stack([draft(path) for path in ((), (0,), (1,), (2,), (3,))])
    plain, mapped = (TreeGrower(log_probs[:1], 3, ids) for ids in (torch.arange(4), token_ids))
    assert mapped.frontier_tokens.tolist() == token_ids[plain.frontier_tokens].tolist()
    of_children = log_probs[1 + plain.frontier_tokens]
    for grower in (plain, mapped):
        grower.expand(of_children)
    plain, mapped = (grower.tree(torch.tensor([5]), 9) for grower in (plain, mapped))
    assert mapped.tokens[0].tolist() == [5] + token_ids[plain.tokens[0, 1:]].tolist()


@given(shapes(SMOOTH), st.lists(st.integers(0, 5), max_size=6))
@settings(deadline=None, max_examples=60)
def test_a_path_that_joins_a_tree_adds_what_the_tree_lacks(shape, tokens):
    tree = make_tree(shape)
    log_probs = [-0.5 * (number + 1) for number in range(len(tokens))]
    joined = tree.with_path(tokens, log_probs)
    paths = [path_of(tree, node) for node in range(tree.size)]
    added = [tuple(tokens[: number + 1]) for number in range(len(tokens))]
    added = [path for path in added if path not in paths]
    assert [path_of(joined, node) for node in range(joined.size)] == paths + added  # each once, old nodes as they were
    assert joined.num_copied == len(added)
    assert torch.equal(joined.log_probs[:, : tree.size], tree.log_probs)
    assert joined.log_probs[0, tree.size :].tolist() == [-0.5 * len(path) for path in added]
    for node in range(joined.size):
        above = {path_of(joined, other): other for other in range(joined.size)}
        path = path_of(joined, node)
        expected = {above[path[:length]] for length in range(len(path) + 1)}
        assert set(joined.ancestors[0, node].nonzero()[:, 0].tolist()) == expected
        assert joined.depths[0, node] == len(path)


def test_a_tree_without_guesses_is_its_root():
    tree = DraftTree.root_only(torch.tensor([4]))
    assert tree.tokens.tolist() == [[4]] and not tree.depths.any() and tree.ancestors.all()
    assert tree.children() == [{}]
    assert tree.contemplate_row_of(tree.contemplated_nodes(1)).tolist() == [[0]]


def chance_to_be_last(tree: DraftTree) -> list[float]:
    """Probability that each node is accepted and none of its children is."""
    probabilities = tree.log_probs[0].double().exp().tolist()
    return [
        probability - sum(probabilities[child] for child in range(1, tree.size) if tree.parents[0, child] == node)
        for node, probability in enumerate(probabilities)
    ]


@given(shapes(STYLES), st.integers(1, 40))
@settings(deadline=None, max_examples=100)
def test_the_nodes_most_likely_to_be_last_are_contemplated(shape, num_rows):
    tree = make_tree(shape)
    nodes = tree.contemplated_nodes(num_rows)[0].tolist()
    assert nodes[0] == 0 and nodes == sorted(set(nodes)) and len(nodes) == min(num_rows, tree.size)
    last = chance_to_be_last(tree)
    chosen = sorted((last[node] for node in nodes[1:]), reverse=True)
    best = sorted(last[1:], reverse=True)[: len(chosen)]
    assert chosen == pytest.approx(best, abs=1e-6)


@given(shapes(STYLES), st.integers(1, 40))
@settings(deadline=None, max_examples=60)
def test_a_node_without_a_row_borrows_from_its_nearest_ancestor(shape, num_rows):
    tree = make_tree(shape)
    nodes = tree.contemplated_nodes(num_rows)
    chosen = nodes[0].tolist()
    for node, row in enumerate(tree.contemplate_row_of(nodes)[0].tolist()):
        while node not in chosen:
            node = int(tree.parents[0, node])
        assert chosen[row] == node


def test_nodes_beyond_the_depth_limit_get_no_contemplate_row():
    parents = torch.tensor([[0, 0, 1, 2, 0, 4]])
    tree = DraftTree.from_parents(torch.arange(6)[None], parents, torch.tensor([[0, -0.1, -0.2, -0.3, -2.0, -3.0]]))
    assert tree.contemplated_nodes(6, max_depth=1).tolist() == [[0, 1, 4]]
    assert tree.contemplated_nodes(2, max_depth=1).tolist() == [[0, 1]]
    assert tree.contemplated_nodes(6, max_depth=0).tolist() == [[0]]
