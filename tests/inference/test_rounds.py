"""How large rounds are: fixed ones as the knobs say, automatic ones as costs and acceptance say, never a clock."""

import json
import math
import random
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from helpers import cached_tensors, make_tiny_draft, make_tiny_target
from transformers_confu import ConFuDraftModel, confu_generation_config
from transformers_confu.inference import decoding, measured_costs, round_costs
from transformers_confu.inference.cached_rows import crop, lengthen
from transformers_confu.inference.draft_tree import DraftTree, TreeGrower
from transformers_confu.inference.grouped_attention import without_repeated_heads
from transformers_confu.inference.growing_cache import GrowingLayer, let_grow, room_to_grow
from transformers_confu.inference.measured_costs import measure_round_costs
from transformers_confu.inference.round_costs import DRAFT_ROWS, TARGET_ROWS, RoundCosts, costs_path
from transformers_confu.inference.rounds import AutomaticRounds
from transformers_confu.inference.target import TargetRunner


PROMPT = torch.tensor([[3, 4, 5, 2, 7]])


def costs(row: float, level: float) -> RoundCosts:
    """Each further row costs `row` steps, a draft level `level`."""
    steps = tuple(1 + row * (rows - 1) for rows in TARGET_ROWS)
    shared = {"target_rows": TARGET_ROWS, "target_steps": steps, "draft_rows": DRAFT_ROWS}
    shared |= {"draft_steps": (level,) * len(DRAFT_ROWS), "step_seconds": 0.1}
    return RoundCosts(**shared, longer=RoundCosts(**shared, context=2048))


# --- costs


def test_costs_between_and_beyond_the_measured_rows():
    table = RoundCosts((1, 2, 4), (1.0, 1.5, 1.7), (1, 4), (0.2, 0.5), step_seconds=0.1)
    assert [table.target(rows) for rows in (1, 2, 3, 4, 6)] == pytest.approx([1.0, 1.5, 1.6, 1.7, 1.9])
    assert [table.draft(rows) for rows in (1, 2, 4, 7)] == pytest.approx([0.2, 0.3, 0.5, 0.8])


def test_measured_costs_never_fall_with_the_rows():
    noisy = RoundCosts.of({1: 2.0, 2: 3.0, 4: 2.5, 8: 8.0}, {1: 0.3, 4: 0.2})
    assert noisy.target_steps == (1.0, 1.5, 1.5, 4.0) and noisy.draft_steps == (0.15, 0.15)
    # Two forwards of one row cost no more.
    assert RoundCosts.of({1: 2.0, 2: 90.0, 4: 3.0}, {1: 0.3}).target_steps == (1.0, 2.0, 2.0)


def test_costs_grow_with_the_text_in_a_straight_line():
    long = RoundCosts((1, 4), (1.0, 2.5), (1,), (0.1,), step_seconds=0.2, context=1100)
    table = RoundCosts((1, 2, 4), (1.0, 1.2, 1.6), (1,), (0.1,), step_seconds=0.1, context=100, longer=long)
    assert table.at(0) == table.at(100) == table
    # In seconds: 0.1, 0.12, 0.16 and 0.2, 0.3, 0.5; half way and twice as far as measured.
    for length, seconds, level in ((600, (0.15, 0.21, 0.33), 0.015), (2100, (0.3, 0.48, 0.84), 0.03)):
        found = table.at(length)
        assert found.target_steps == pytest.approx([taken / seconds[0] for taken in seconds])
        assert (found.step_seconds, found.draft(1)) == pytest.approx((seconds[0], level / seconds[0]))


def test_automatic_rounds_ask_for_the_costs_of_their_length():
    dear = RoundCosts((1, 16), (1.0, 16.0), (1,), (0.1,), step_seconds=1.0, context=1000)
    table = RoundCosts((1, 16), (1.0, 1.15), (1,), (0.1,), step_seconds=0.1, longer=dear)
    grower = TreeGrower(torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]]).log(), 5, torch.arange(5))
    sizes = []
    for length in (50, 1000):
        rounds = AutomaticRounds(table, contemplation=0, future_gain=0.0)
        rounds.depth(length, 8)
        sizes.append(rounds.tree_size(grower))
    assert sizes == [6, 1]


@pytest.mark.parametrize(
    "values",
    [
        {"target_steps": (1.0, float("nan"), 2.0)},
        {"target_steps": (1.0, 0.5, 2.0)},
        {"target_steps": (1.0, 1.5)},
        {"target_rows": (2, 4, 8)},
        {"draft_steps": (0.0, 1.0)},
        {"longer": RoundCosts((1,), (1.0,), (1,), (0.1,), step_seconds=0.1)},  # behind a text no longer
    ],
)
def test_impossible_costs_are_no_table(values):
    possible = {
        "target_rows": (1, 2, 4),
        "target_steps": (1.0, 1.5, 2.0),
        "draft_rows": (1, 4),
        "draft_steps": (0.1, 0.2),
    }
    RoundCosts(**possible, step_seconds=0.1)
    with pytest.raises(ValueError, match="cannot cost"):
        RoundCosts(**(possible | values), step_seconds=0.1)


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """An empty cache folder, and a target and a draft nobody has measured."""
    monkeypatch.setenv("TRANSFORMERS_CONFU_CACHE", str(tmp_path))
    monkeypatch.setattr(round_costs, "_KNOWN", {})
    target = make_tiny_target()
    return target, make_tiny_draft(target)


def measured(target, draft, level: float, is_quiet: bool = True, forget: bool = False) -> tuple[RoundCosts, bool]:
    """The costs as a call sees them, and whether they were measured for it; as in a new process with `forget`."""
    calls = []
    if forget:
        round_costs._KNOWN.clear()
    found = round_costs.round_costs(target, draft, lambda: (calls.append(1) or costs(0.1, level), is_quiet))
    return found, bool(calls)


@pytest.mark.parametrize("is_quiet", [True, False])
def test_costs_are_measured_once_and_kept_if_the_machine_was_quiet(kept, is_quiet):
    assert measured(*kept, 0.1, is_quiet) == (costs(0.1, 0.1), True)
    assert measured(*kept, 0.2) == (costs(0.1, 0.1), False)
    assert measured(*kept, 0.2, forget=True) == (costs(0.1, 0.1 if is_quiet else 0.2), not is_quiet)


def test_costs_of_something_else_are_measured_anew(kept, monkeypatch):
    target, draft = kept
    measured(target, draft, 0.1)
    others = [(target, make_tiny_draft(target, num_soft_prompts=2)), (make_tiny_target("qwen3"), draft)]
    others.append((make_tiny_target(dtype=torch.float32), draft))
    for other in others:
        assert measured(*other, 0.2) == (costs(0.1, 0.2), True)
    for owner, name, value in ((torch, "get_num_threads", 99), (torch.backends.cpu, "get_cpu_capability", "OLDER")):
        monkeypatch.setattr(owner, name, lambda value=value: value)
        assert measured(target, draft, 0.2) == (costs(0.1, 0.2), True)


@pytest.mark.parametrize("damage", ["", "[]", '{"key": 1', "foreign", "impossible"])
def test_a_damaged_or_foreign_table_is_not_trusted(kept, damage):
    measured(*kept, 0.1)
    path = costs_path(round_costs.costs_key(*kept))
    content = json.loads(path.read_text())
    if damage == "foreign":
        content["key"]["threads"] = 99
    elif damage == "impossible":
        content["costs"]["target_steps"][2] = -1
    path.write_text(json.dumps(content) if damage.isalpha() else damage)
    assert measured(*kept, 0.2, forget=True) == (costs(0.1, 0.2), True)
    assert measured(*kept, 0.3, forget=True) == (costs(0.1, 0.2), False)  # and it was replaced


def test_kept_costs_are_found_by_the_names_of_their_models(kept, monkeypatch, tmp_path):
    for model, name in zip(kept, ("target", "draft"), strict=True):
        model.save_pretrained(tmp_path / name)
    target = AutoModelForCausalLM.from_pretrained(tmp_path / "target", dtype=torch.float64)
    draft = ConFuDraftModel.from_pretrained(tmp_path / "draft", dtype=torch.float64)
    measured(target, draft, 0.1)
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, Path()):
        ((_, key, found),) = round_costs.kept_costs(str(folder / "target"), str(folder / "draft"))
        assert (found, key["threads"]) == (costs(0.1, 0.1), torch.get_num_threads())
    assert not list(round_costs.kept_costs("target", "another"))


def test_a_folder_that_cannot_be_written_is_done_without(kept, tmp_path):
    (tmp_path / "round_costs").write_text("a file where the folder should be")
    assert measured(*kept, 0.1) == (costs(0.1, 0.1), True)
    assert measured(*kept, 0.2) == (costs(0.1, 0.1), False)  # known to this process


def test_a_measurement_leaves_models_and_random_state_alone():
    target = make_tiny_target(max_position_embeddings=20)
    draft = make_tiny_draft(target)
    before, state = target.generate(PROMPT, max_new_tokens=5, do_sample=False), torch.random.get_rng_state()
    table, _ = measure_round_costs(target, draft)
    assert torch.equal(state, torch.random.get_rng_state())
    assert table.target_rows == TARGET_ROWS and table.target_steps[0] == 1.0
    assert (table.context, table.longer) == (13, None)  # the deepest leaf stands at the last of 20 positions
    table, _ = measure_round_costs(target := make_tiny_target(), make_tiny_draft(target))
    assert (table.context, table.longer.context) == (128, 505)
    assert torch.equal(target.generate(PROMPT, max_new_tokens=5, do_sample=False), before)


# --- automatic rounds


def test_the_tree_has_the_size_of_most_value():
    grower = TreeGrower(torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]]).log(), 5, torch.arange(5))
    for row in (0.01, 0.08, 0.12, 0.18, 0.3, 0.6):
        rounds = AutomaticRounds(costs(row, 1e-6), contemplation=0, future_gain=0.0)
        # By hand: at the rate of plain decoding a node is kept while its probability exceeds its row's cost.
        assert rounds.tree_size(grower) == 1 + sum(p > row for p in (0.5, 0.2, 0.15, 0.1, 0.05))


def test_a_level_is_drafted_while_it_pays():
    grower = TreeGrower(torch.tensor([[0.9, 0.05, 0.05]]).log(), 3, torch.arange(3))
    # What an accepted node's children add is believed to be 0.6 tokens; a row of the target costs 0.01 steps.
    assert AutomaticRounds(costs(0.01, 0.1), 0, 0.0).width(grower) == 3  # further nodes cost the draft nothing
    dear = RoundCosts((1, 16), (1.0, 1.15), (1, 4), (0.1, 0.4), step_seconds=0.1)
    assert AutomaticRounds(dear, 0, 0.0).width(grower) == 1  # 0.05 * 0.6 - 0.01 < 0.1
    assert AutomaticRounds(costs(0.01, 0.6), 0, 0.0).width(grower) == 0
    assert AutomaticRounds(costs(0.6, 1e-6), 0, 0.0).width(grower) == 0


def expected_rate(draft_acceptance: float, table: RoundCosts, probability: float, rounds_count: int = 300) -> float:
    """Tokens per step of automatic rounds whose draft says `probability` and is right with `draft_acceptance`."""
    rng = random.Random(0)
    rounds = AutomaticRounds(table, contemplation=0, future_gain=0.0)
    vocab_size = 50
    logits = torch.full((vocab_size,), math.log((1 - probability) / (vocab_size - 1)))
    logits[0] = math.log(probability)
    tokens = spent = 0.0
    for _ in range(rounds_count):
        depth = rounds.depth(0, 8)
        steps, tree = 0.0, DraftTree.root_only(torch.tensor([0]))
        if depth:
            steps += table.draft(1)
            grower = TreeGrower(logits[None], rounds.branching, torch.arange(vocab_size))
            for _ in range(1, depth):
                if (width := rounds.width(grower)) == 0:
                    break
                steps += table.draft(width)
                grower.narrow(width)
                grower.expand(logits.expand(1, grower.frontier_tokens.shape[1], -1))
            tree = grower.tree(torch.tensor([0]), rounds.tree_size(grower))
        else:
            rounds.tree_size(None)
        rounds.contemplate_rows(tree)
        path, children = [0], tree.children()[0]
        while (child := children.get((path[-1], 0))) is not None and rng.random() < draft_acceptance:
            path.append(child)
        rounds.count(tree, path)
        tokens += len(path)
        spent += steps + table.target(tree.size)
    return tokens / spent


@pytest.mark.parametrize("probability", [0.02, 0.5, 0.95])
def test_a_draft_that_is_never_right_costs_little(probability):
    # However sure it is of itself.
    assert expected_rate(0.0, costs(0.5, 0.2), probability) > 0.93


def test_a_draft_that_is_mostly_right_pays():
    chain_of_7 = (1 - 0.9**8) / 0.1 / (1 + 7 * 0.02 + 7 * 0.05)  # tokens of a round over its steps, at a fixed size
    assert expected_rate(0.9, costs(0.02, 0.05), 0.9) > 0.95 * chain_of_7


def test_where_rows_are_dear_decoding_is_plain():
    assert expected_rate(0.5, costs(1.0, 0.5), 0.5) > 0.93


@pytest.fixture(scope="module")
def pair():
    target = make_tiny_target()
    return target, make_tiny_draft(target)


def sizes_of(pair, **knobs) -> list[int]:
    target, draft = pair
    config = confu_generation_config(target, max_new_tokens=60, do_sample=False, **knobs)
    target.generate(PROMPT, assistant_model=draft, generation_config=config)
    return draft.last_statistics.tree_sizes


def test_no_clock_decides_a_round(pair, monkeypatch):
    expected = sizes_of(pair)
    rng = random.Random(0)
    monkeypatch.setattr(time, "perf_counter", rng.random)
    assert sizes_of(pair) == expected


def test_an_untrained_draft_soon_gives_way_to_plain_rounds(pair):
    sizes = sizes_of(pair, confu_lookup=False)
    assert sum(size == 1 for size in sizes) > 0.8 * len(sizes)


def test_a_fixed_knob_fixes_all(pair):
    assert set(sizes_of(pair, confu_depth=3)[:-4]) == {30}


def test_contemplation_rests_unless_it_pays(pair, monkeypatch):
    target, draft = pair

    def rows(**knobs) -> int:
        sizes_of(pair, **knobs)
        return draft.last_statistics.contemplate_rows

    monkeypatch.setattr(decoding, "round_costs", lambda *_: costs(0.001, 0.001))
    assert rows(confu_future_gain=0.0) == rows(confu_future_gain=-0.1) == rows(confu_contemplation=0) == 0
    assert rows(confu_future_gain=0.4) > 0 and rows(confu_contemplation=2, confu_future_gain=0.0) > 0
    assert rows(confu_tree_size=4, confu_future_gain=0.0) == 0  # also in fixed rounds
    assert rows(confu_tree_size=4) > rows(confu_tree_size=4, confu_contemplation=1, confu_future_gain=0.0) > 0
    monkeypatch.setattr(decoding, "round_costs", lambda *_: costs(5.0, 0.001))
    assert rows(confu_future_gain=0.4) == 0


# --- what a round costs the host


class Operations(TorchDispatchMode):
    """Counts operations, and those that wait for the device; and the numbers of the largest tensor that was made."""

    def __init__(self):
        super().__init__()
        self.total = self.host_reads = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.total += 1
        self.host_reads += func is torch.ops.aten._local_scalar_dense.default
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view and "_" not in func._schema.name[-1]:
            self.largest = max(self.largest, result.numel())
        return result


def test_a_greedy_round_reads_the_device_once(pair, monkeypatch):
    target, draft = pair
    lists = []
    own = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: lists.append(1) or own(tensor))
    knobs = {"confu_tree_size": 8, "confu_depth": 3, "confu_branching": 3, "confu_contemplation": 0}

    def count(num_tokens: int) -> torch.Tensor:
        lists.clear()
        config = confu_generation_config(target, max_new_tokens=num_tokens, do_sample=False, **knobs)
        with Operations() as operations:
            target.generate(PROMPT, assistant_model=draft, generation_config=config)
        return torch.tensor([operations.total, operations.host_reads + len(lists), draft.last_statistics.rounds])

    operations, host_reads, rounds = count(60) - count(10)
    # One transfer for the walk, and on the CPU, where reading is free, one for the width of each of two levels.
    assert host_reads / rounds <= 3.2
    assert operations / rounds <= 1150  # 1083 when this was written: three levels of the draft, five of the target


@pytest.mark.parametrize("num_rows", [1, 6])
def test_no_head_has_a_copy_of_the_text(pair, num_rows):
    """Of 4 query heads, two share each key and value head: a layer holds 300 x 2 x 8 keys."""
    target, draft = pair
    runner = TargetRunner(target, draft.config, draft.future_channel)
    cache = DynamicCache(config=target.config)
    target(input_ids=torch.arange(300)[None] % 97, cache=cache, use_cache=True)
    let_grow(cache)
    tokens = torch.arange(num_rows)[None]
    tree = DraftTree.from_parents(tokens, (tokens - 1).clamp(min=0), -tokens.float())
    visible = (torch.arange(300) > 7)[None]
    arguments = (tree, None, torch.zeros(1, draft.config.taps_size), cache, torch.tensor([300]), visible)
    expected = runner.verify(*arguments).outputs.logits
    crop(cache, 300)
    with without_repeated_heads(), Operations() as operations:
        found = runner.verify(*arguments).outputs.logits
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert operations.largest < 300 * 2 * 8


def test_attention_is_transformers_own_outside_of_rounds(pair):
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with pytest.raises(RuntimeError), without_repeated_heads(), without_repeated_heads():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not own
        raise RuntimeError
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own
    target, _ = pair
    rows = torch.arange(12)[None]
    padding = (rows > 3).long()
    expected = target(input_ids=rows, attention_mask=padding).logits
    with without_repeated_heads():  # as in another thread
        assert torch.equal(target(input_ids=rows, attention_mask=padding).logits, expected)


# --- the cache


@given(
    st.none() | st.integers(2, 9),
    st.integers(1, 30),
    st.lists(st.tuples(st.integers(1, 120), st.integers(0, 10**6)), max_size=12),
)
@settings(deadline=None, max_examples=80)
def test_a_growing_layer_reads_the_rows_of_the_text(window, prompt, rounds):
    """Each round adds rows, of which some become text; against the whole text, and the rows that a window shows."""
    generator = torch.Generator().manual_seed(0)

    def states(rows: int) -> torch.Tensor:
        return torch.randn(1, 2, rows, 3, generator=generator)

    def seen() -> torch.Tensor:
        return text if window is None else text[..., max(text.shape[-2] - window + 1, 0) :, :]

    text = states(prompt)
    plain = DynamicLayer() if window is None else DynamicSlidingWindowLayer(window)
    cache = DynamicCache()
    cache.layers = [plain]
    plain.update(text, -text)
    with room_to_grow(cache):
        assert type(cache.layers[0]) is GrowingLayer
        for added, seed in rounds:
            new = states(added)
            keys, values = cache.layers[0].update(new, -new)
            assert torch.equal(keys, torch.cat([seen(), new], dim=-2)) and torch.equal(values, -keys)
            path = sorted(random.Random(seed).sample(range(added), 1 + seed % added))
            TargetRunner.compact(None, cache, text.shape[-2], path)
            text = torch.cat([text, new[..., path, :]], dim=-2)
            assert cache.get_seq_length() == text.shape[-2]
    assert cache.layers == [plain] and plain.get_seq_length() == text.shape[-2]
    assert torch.equal(plain.keys, seen()) and plain.keys.is_contiguous()
    # And it goes on as any such layer.
    new = states(1)
    keys, _ = plain.update(new, -new)
    assert torch.equal(keys, torch.cat([seen(), new], dim=-2))


@pytest.mark.parametrize("kind", ["llama", "windows"])
def test_a_lengthened_cache_is_as_large_as_that_of_a_long_text(kind):
    target = make_tiny_target(kind)
    short, long = DynamicCache(config=target.config), DynamicCache(config=target.config)
    for cache, length in ((short, 9), (long, 40)):
        target(input_ids=torch.arange(length)[None], cache=cache, use_cache=True)
    lengthen(short, 40)
    for found, expected in zip(short.layers, long.layers, strict=True):
        assert found.keys.shape == expected.keys.shape == found.values.shape
        assert found.get_seq_length() == expected.get_seq_length() == 40


@pytest.mark.parametrize("kind", ["llama", "windows", "hybrid"])
def test_measured_rounds_leave_the_text_as_it_was(kind, monkeypatch):
    """Else later ones would be measured behind less text."""
    target = make_tiny_target(kind)
    draft, caches = make_tiny_draft(target), []
    monkeypatch.setattr(measured_costs, "let_grow", lambda cache: (caches.append(cache), let_grow(cache)))
    run = torch.no_grad()(measured_costs._target_rounds)(target, draft, 200)
    before = [tensor.clone() for tensor in cached_tensors(caches[0])]
    for _ in range(3):
        for rows in TARGET_ROWS:
            with torch.no_grad():
                run(rows)
    assert all(torch.equal(one, other) for one, other in zip(cached_tensors(caches[0]), before, strict=True))


def test_a_text_is_not_copied_when_it_grows():
    layer = DynamicLayer()
    layer.update(torch.zeros(1, 2, 1000, 4), torch.zeros(1, 2, 1000, 4))
    grown = GrowingLayer(layer)
    place = grown.keys.data_ptr()
    for _ in range(20):
        grown.update(torch.ones(1, 2, 10, 4), torch.ones(1, 2, 10, 4))
    assert grown.keys.data_ptr() == place and grown.keys.shape[-2] == 1200
