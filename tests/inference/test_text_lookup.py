"""Tokens copied from the text: which, against a naive search, how likely they are thought, what becomes of them."""

import math
from bisect import bisect_left

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rounds import costs

from helpers import make_tiny_draft, make_tiny_target
from transformers_confu import confu_generation_config
from transformers_confu.inference import decoding
from transformers_confu.inference.draft_tree import DraftTree, TreeGrower
from transformers_confu.inference.knobs import ConFuKnobs
from transformers_confu.inference.rounds import AutomaticRounds, FixedRounds
from transformers_confu.inference.text_lookup import TextLookup


PERIOD = [5, 6, 7, 8]


def class_of(matched: int) -> int:
    return bisect_left(TextLookup.CLASSES, matched)


def guesses(text: list[int]) -> list[tuple[int | None, int]]:
    """Behind every prefix of a text: where its next token is guessed to stand, and how many tokens match before."""
    found: list[tuple[int | None, int]] = [(None, 0)]
    for end in range(1, len(text) + 1):
        prefix, (place, _) = text[:end], found[-1]
        if place is not None and text[place] == text[end - 1]:
            place += 1
        else:
            places = [other for other in range(2, end) if prefix[other - 2 : other] == prefix[-2:]]
            place = max(places, default=None)
        matched = 0
        while place is not None and matched < place and prefix[place - 1 - matched] == prefix[-1 - matched]:
            matched += 1
        found.append((place, matched))
    return found


@given(st.lists(st.integers(0, 2), max_size=60), st.integers(0, 60))
@settings(deadline=None, max_examples=150)
def test_what_is_copied_and_how_far_it_is_trusted(text, prompt_length):
    lookup = TextLookup()
    lookup.read(text[:prompt_length])
    for token in text[prompt_length:]:
        lookup.append([token])
    found = guesses(text)
    place, matched = found[-1]
    if place is None:
        assert lookup.tokens(5) == lookup.chances(5) == []
        return
    copied = list(text)
    for number in range(5):
        copied.append(copied[place + number])
    assert lookup.tokens(5) == copied[len(text) :]
    right, tried = [share * 4.0 for share in TextLookup.PRIOR], [4.0] * 6
    for end in range(prompt_length, len(text)):
        guess, before = found[end]
        if guess is not None:
            tried[class_of(before)] += 1
            right[class_of(before)] += text[guess] == text[end]
    shares = [right[class_of(matched + number)] / tried[class_of(matched + number)] for number in range(5)]
    expected = [math.prod(shares[: number + 1]) for number in range(5)]
    assert lookup.chances(5) == pytest.approx(expected)


def test_the_drafts_opinion_counts_for_the_first_token():
    def chances(agreed: bool | None) -> list[float]:
        lookup = TextLookup()
        lookup.read(PERIOD * 2 + PERIOD[:2])
        for _ in range(20):  # the draft always agrees, and is right with the next token
            lookup.agreed = True
            lookup.append([lookup.tokens(1)[0]])
        lookup.agreed = agreed
        return lookup.chances(2)

    unasked, agreed, denied = (chances(opinion) for opinion in (None, True, False))
    last = len(TextLookup.CLASSES)
    assert denied[0] == TextLookup.PRIOR_DENIED[last]  # nothing was seen of it
    assert agreed[0] > unasked[0] > TextLookup.PRIOR[last] > denied[0]
    for first, second in (unasked, agreed, denied):
        assert second / first == pytest.approx(unasked[0])


def repeating(rounds: int = 10) -> TextLookup:
    lookup = TextLookup()
    lookup.read(PERIOD * rounds)
    return lookup


@pytest.mark.parametrize("row", [0.01, 0.2, 0.5, 0.95])
def test_as_many_tokens_are_copied_as_pay(row):
    lookup = repeating()
    rounds = AutomaticRounds(costs(row, 0.1), contemplation=0, future_gain=0.0, lookup=lookup)
    assert rounds.depth(0, room=50) == 0  # likely enough that the draft is not asked
    assert rounds.tree_size(None) == 1
    tokens, log_probs = rounds.copies(DraftTree.root_only(torch.tensor([PERIOD[-1]])))
    chances = [TextLookup.PRIOR[-1] ** number for number in range(1, 33)]
    expected = sum(chance > row for chance in chances)
    assert tokens == (PERIOD * 8)[:expected]
    assert [math.exp(log_prob) for log_prob in log_probs] == pytest.approx(chances[:expected])
    rounds.depth(0, room=3)
    assert len(rounds.copies(DraftTree.root_only(torch.tensor([PERIOD[-1]])))[0]) == min(expected, 3)


@pytest.mark.parametrize("levels, drafted", [(1, 9), (2, AutomaticRounds.MAX_NODES)])
def test_drafted_and_copied_nodes_are_together_no_more_than_any_tree(levels, drafted):
    """Where rows cost next to nothing and the text is sure to go on."""
    rounds = AutomaticRounds(costs(1e-9, 1e-9), 0, 0.0, repeating(), longest_copy=100)
    assert rounds.depth(0, room=200) == rounds.MAX_DEPTH
    flat = torch.full((1, 8), 1 / 8).log()
    grower = TreeGrower(flat, 8, torch.arange(100, 108))
    for _ in range(levels - 1):
        grower.expand(flat[:, None].expand(-1, 8, -1))
    tree = grower.tree(torch.tensor([PERIOD[-1]]), rounds.tree_size(grower))
    assert tree.size == drafted
    assert tree.with_path(*rounds.copies(tree)).size == rounds.MAX_NODES


@pytest.mark.parametrize("likeliest, prior", [(PERIOD[2], TextLookup.PRIOR_AGREED), (9, TextLookup.PRIOR_DENIED)])
def test_levels_are_drafted_only_for_what_is_not_copied(likeliest, prior):
    grower = TreeGrower(torch.tensor([[0.9, 0.05, 0.05]]).log(), 3, torch.tensor([likeliest, 1, 2]))
    # By hand: where a node is accepted, 0.6 of its children are, but where the next two tokens are copied they are not
    # needed. Each is a row of the target, of 0.01 steps.
    gain = sum(0.6 * chance * (1 - prior[0] * TextLookup.PRIOR[1]) - 0.01 for chance in (0.9, 0.05, 0.05))
    for level, width in ((gain - 0.01, 3), (gain + 0.01, 0)):
        lookup = TextLookup()
        lookup.read([*PERIOD, 1, *PERIOD[:2]])  # two tokens match
        rounds = AutomaticRounds(costs(0.01, level), 0, 0.0, lookup)
        assert rounds.depth(0, room=50) == rounds.MAX_DEPTH
        assert rounds.width(grower) == width


def test_drafted_nodes_are_judged_without_the_copied_ones():
    """The correction of the draft's probabilities, and whether drafting pays, learn from its own nodes only."""

    def learned(lookup: TextLookup | None) -> list[float]:
        rounds = AutomaticRounds(costs(0.01, 0.01), 0, 0.0, lookup)
        rounds.depth(0, room=50)
        grower = TreeGrower(torch.tensor([[0.6, 0.3, 0.1]]).log(), 3, torch.tensor([1, 2, 3]))
        tree = grower.tree(torch.tensor([0]), rounds.tree_size(grower))
        tree = tree.with_path(*rounds.copies(tree))
        assert (tree.num_copied > 2) is (lookup is not None)
        path = [0] if lookup is None else [0, tree.size - tree.num_copied, tree.size - tree.num_copied + 1]
        rounds.count(tree, path)
        return [*rounds.expected, *rounds.accepted, rounds.expanded, rounds.continued, rounds.gain]

    lookup = TextLookup()
    lookup.read([*PERIOD, *PERIOD[:2]])
    assert learned(lookup) == learned(None)


def test_in_fixed_rounds_copied_tokens_take_the_place_of_drafted_ones():
    knobs = ConFuKnobs(tree_size=12, depth=3, branching=4, lookup=True)
    rounds = FixedRounds(knobs, repeating())
    assert rounds.depth(0, room=50) == 2
    assert rounds.tree_size(None) == 3
    assert rounds.copies(DraftTree.root_only(torch.tensor([PERIOD[-1]])))[0] == (PERIOD * 3)[:9]
    assert rounds.depth(0, room=2) == 2 and rounds.tree_size(None) == 10
    unlike = FixedRounds(knobs, TextLookup())
    assert unlike.depth(0, room=50) == 3 and unlike.tree_size(None) == 12
    assert FixedRounds(ConFuKnobs(tree_size=12)).tree_size(None) == 12


@pytest.mark.parametrize("kind", ["llama", "windows", "hybrid"])
@pytest.mark.parametrize("size", [{}, {"confu_tree_size": 8, "confu_depth": 3, "confu_branching": 3}])
def test_texts_that_repeat_themselves_take_fewer_rounds(size, kind, monkeypatch):
    monkeypatch.setattr(decoding, "round_costs", lambda *_: costs(0.02, 0.05))
    target = make_tiny_target(kind)
    draft = make_tiny_draft(target)
    prompt = torch.tensor([PERIOD * 3])
    # Only one of these tokens has a score, that which follows in the period.
    after = {token: [[PERIOD[(place + 1) % 4]], []] for place, token in enumerate(PERIOD)}

    def keep_to_the_period(input_ids, scores):
        likely = torch.full_like(scores, -30.0)
        likely[0, after[int(input_ids[0, -1])][0]] = 0.0
        return likely

    counts = {}
    for lookup in (False, True):
        config = confu_generation_config(
            target, max_new_tokens=40, do_sample=False, confu_contemplation=0, confu_lookup=lookup, **size
        )
        text = target.generate(
            prompt, generation_config=config, assistant_model=draft, logits_processor=[keep_to_the_period]
        )
        assert text[0].tolist() == PERIOD * 13
        statistics = draft.last_statistics
        counts[lookup] = statistics.rounds
        assert (statistics.copied > 0) is lookup
        assert statistics.copied <= sum(statistics.accepted)
    longest = 6 if size else 8 if kind == "hybrid" else 32
    assert counts[False] > 20 and counts[True] <= math.ceil(39 / (longest + 1)) + 1


@pytest.mark.parametrize("knobs", [{"confu_lookup": False}, {"confu_tree_size": 8}])
def test_nothing_is_copied_unasked(knobs):
    target = make_tiny_target()
    draft = make_tiny_draft(target)
    config = confu_generation_config(target, max_new_tokens=12, do_sample=False, **knobs)
    target.generate(torch.tensor([PERIOD * 3]), generation_config=config, assistant_model=draft)
    assert draft.last_statistics.copied == 0
