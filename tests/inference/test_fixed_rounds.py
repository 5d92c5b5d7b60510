"""Rounds over a static cache: tensors of one shape whatever the text, compiled without a break, and the same text."""

import functools
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, StaticCache

from exactness import assert_close, assert_identical, compare, decode_plainly, truly_fp64
from helpers import make_family, make_tiny_draft, make_tiny_target
from transformers_confu import confu_generation_config
from transformers_confu.inference import decoding
from transformers_confu.inference.rounds import EqualRounds
from transformers_confu.inference.target import TargetRunner


KNOBS = {"tree_size": 8, "depth": 3, "branching": 3}


@pytest.fixture(autouse=True)
def wide():
    with truly_fp64():
        yield


@functools.cache
def pair(kind: str):
    target = make_tiny_target(kind)
    window = 6 if kind == "qwen3" else None
    return target, make_tiny_draft(
        target, draft_vocab_size=60, rotate_soft_prompts=kind == "qwen3", attention_window=window
    )


def prompt_of(length: int) -> torch.LongTensor:
    return torch.randint(2, 97, (1, length), generator=torch.Generator().manual_seed(length))


def compile_config() -> CompileConfig:
    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True  # Transformers compiles nothing on a CPU unless told to
    return config


@pytest.mark.parametrize("length", [1, 9, EqualRounds.BUCKET - 8])  # the last text grows beyond a bucket
@pytest.mark.parametrize("contemplation", [0, 3, 8])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_the_text_is_that_of_plain_static_generation(kind, contemplation, length):
    options = {"max_new_tokens": 24, "cache_implementation": "static"}
    for sampling in ({"do_sample": False}, {"do_sample": True, "temperature": 0.7}):
        comparison = compare(
            *pair(kind),
            prompt_of(length),
            options | sampling,
            KNOBS | {"contemplation": contemplation},
            oracle=True,
            record=True,
        )
        assert_identical(comparison)
        assert comparison.statistics.tau > 1.5
        assert isinstance(comparison.assisted.cache, StaticCache)
        rows = int(comparison.plain.cache.get_seq_length())
        assert rows == int(comparison.assisted.cache.get_seq_length())
        for one, other in zip(comparison.plain.cache.layers, comparison.assisted.cache.layers, strict=True):
            assert_close(one.keys[..., :rows, :], other.keys[..., :rows, :], 1e-12)
            assert_close(one.values[..., :rows, :], other.values[..., :rows, :], 1e-12)


@pytest.mark.parametrize("contemplation", [0, 3, 8])
def test_trees_and_predictions_are_those_of_the_growing_cache(contemplation):
    target, draft = pair("qwen3")
    seen: list[list] = []
    verify = TargetRunner.verify

    def recorded(runner, tree, nodes, *args, **kwargs):
        verification = verify(runner, tree, nodes, *args, **kwargs)
        if contemplation:
            seen[-1].append((tree.tokens, tree.parents, tree.log_probs, nodes, verification.futures))
        else:
            seen[-1].append((tree.tokens, tree.parents, tree.log_probs, verification.taps))
        return verification

    knobs = {f"confu_{name}": value for name, value in (KNOBS | {"contemplation": contemplation}).items()}
    # Before its first call a pair is proved, by trees of its own.
    first = confu_generation_config(target, max_new_tokens=2, **knobs)
    target.generate(prompt_of(9), assistant_model=draft, generation_config=first)
    with mock.patch.object(TargetRunner, "verify", recorded):
        for cache in (None, "static"):
            seen.append([])
            torch.manual_seed(0)
            # The last rounds differ: those over a static cache keep their shape where others have less room.
            config = confu_generation_config(
                target, max_new_tokens=40, do_sample=True, top_k=3, cache_implementation=cache, **knobs
            )
            target.generate(prompt_of(9), assistant_model=draft, generation_config=config)
    growing, fixed = (rounds[:-8] for rounds in seen)
    assert len(growing) > 10
    assert_close(growing, fixed, 1e-12)


@pytest.mark.parametrize("contemplation", [0, 6])
def test_compiled_rounds_have_the_same_graphs_whatever_the_text(contemplation):
    target = make_tiny_target(num_hidden_layers=2)
    draft = make_tiny_draft(target, target_hidden_state_indices=[0, 1, 2])
    options = {
        "confu_tree_size": 6,
        "confu_depth": 2,
        "confu_branching": 3,
        "confu_contemplation": contemplation,
        "cache_implementation": "static",
        "compile_config": compile_config(),
    }
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    calls = ((9, 20, False, 3), (130, 20, False, 3), (1, 40, True, 4), (30, 20, True, 4), (9, 20, False, 4))
    for length, new_tokens, do_sample, graphs in calls:
        plain_options = {"max_new_tokens": new_tokens, "do_sample": do_sample}
        plain, _ = decode_plainly(target, prompt_of(length), plain_options)
        torch.manual_seed(0)
        text = target.generate(
            prompt_of(length),
            assistant_model=draft,
            generation_config=confu_generation_config(target, **plain_options, **options),
        )
        assert torch.equal(text, plain.sequences)
        assert draft.last_statistics.rounds > 5
        # What grows the tree, what verifies it, what keeps its path: compiled in the first call, and never again; but
        # where tokens are drawn, trees grow from their noise as well.
        assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]


class Outside(TorchDispatchMode):
    """Counts operations, but for views, outside of the functions that it may compile."""

    def __init__(self):
        super().__init__()
        self.operations, self.inside = 0, False

    def compiled(self, function):
        def call(*args, **kwargs):
            self.inside = True
            result = function(*args, **kwargs)
            self.inside = False
            return result

        return call

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += not self.inside and not func.is_view
        assert func is not torch.ops.aten._local_scalar_dense.default or not self.inside  # would wait for the device
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("contemplation, most", [(0, 24), (8, 50)])
def test_little_of_a_round_is_outside_of_what_is_compiled(monkeypatch, contemplation, most):
    target, draft = pair("llama")
    knobs = {f"confu_{name}": value for name, value in (KNOBS | {"contemplation": contemplation}).items()}
    counts = []
    for new_tokens in (10, 60):
        config = confu_generation_config(
            target, max_new_tokens=new_tokens, do_sample=False, cache_implementation="static", **knobs
        )
        outside = Outside()
        monkeypatch.setattr(decoding, "not_compiled", outside.compiled)
        with outside:
            target.generate(prompt_of(9), assistant_model=draft, generation_config=config)
        counts.append((outside.operations, draft.last_statistics.rounds))
    (few, fewer_rounds), (many, more_rounds) = counts
    assert (many - few) / (more_rounds - fewer_rounds) <= most  # 21 and 48 when this was written


def test_nothing_is_compiled_where_plain_generation_compiles_nothing():
    target, draft = pair("llama")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for options in ({}, {"compile_config": compile_config(), "disable_compile": True}):
        target.generate(
            prompt_of(5), assistant_model=draft, max_new_tokens=6, cache_implementation="static", **options
        )
    assert not torch._dynamo.utils.counters["stats"]


@pytest.mark.parametrize("future_gain, rows", [(0.4, 30), (0.0, 0)])
def test_without_knobs_all_rounds_have_the_size_that_knobs_default_to(future_gain, rows):
    target, draft = pair("llama")
    config = confu_generation_config(
        target, max_new_tokens=9, do_sample=False, cache_implementation="static", confu_future_gain=future_gain
    )
    target.generate(prompt_of(5), assistant_model=draft, generation_config=config)
    statistics = draft.last_statistics
    assert set(statistics.tree_sizes) == {30}
    assert statistics.contemplate_rows == rows * statistics.rounds


def test_padding_stays_hidden():
    target, draft = pair("llama")
    prompt, mask = prompt_of(9), torch.tensor([[0] * 3 + [1] * 6])
    options = {"do_sample": False, "max_new_tokens": 16, "cache_implementation": "static"}
    call = functools.partial(dict, attention_mask=mask)
    comparison = compare(target, draft, prompt, options, KNOBS, oracle=True, call=call)
    assert comparison.statistics.tau > 1.5
    assert_close(comparison.plain.scores, comparison.assisted.scores, 1e-5)
    # The states of padding are not compared: it sees nothing, and so averages whatever rows a cache has.
    for one, other in zip(comparison.plain.hidden_states, comparison.assisted.hidden_states, strict=True):
        assert_close([states[:, -6:] for states in one], [states[:, -6:] for states in other], 1e-12)


@pytest.mark.parametrize(("knobs", "warns"), [(KNOBS | {"lookup": True}, True), (KNOBS, False), ({}, False)])
def test_copies_that_were_asked_for_are_said_to_be_missing(knobs, warns, monkeypatch):
    target, draft = pair("llama")
    warnings: list[str] = []
    monkeypatch.setattr(decoding.logger, "warning_once", warnings.append)
    names = {f"confu_{name}": value for name, value in knobs.items()}
    config = confu_generation_config(target, max_new_tokens=4, cache_implementation="static", **names)
    target.generate(prompt_of(9), assistant_model=draft, generation_config=config)
    assert [("`confu_lookup=True`" in text) for text in warnings] == [True] * warns


def test_a_text_goes_on_over_a_static_cache_also_after_a_call_that_failed():
    target, draft = pair("qwen3")
    call = {"cache": StaticCache(config=target.config, max_cache_len=60), "do_sample": False}
    with torch.inference_mode():
        first = target.generate(prompt_of(9), assistant_model=draft, max_new_tokens=11, **call)
    text = torch.cat([first, prompt_of(4)], dim=1)
    with mock.patch.object(TargetRunner, "verify", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        target.generate(text, assistant_model=draft, max_new_tokens=12, **call)
    assert int(call["cache"].get_seq_length()) == first.shape[1] - 1
    second = target.generate(text, assistant_model=draft, max_new_tokens=12, **call)
    assert draft.last_statistics.draft_state == "carried"
    plain = target.generate(text, do_sample=False, max_new_tokens=12)
    assert torch.equal(second, plain)
    # And plain generation goes on over what our rounds left.
    third = target.generate(second, max_new_tokens=8, **call)
    assert torch.equal(third, target.generate(second, do_sample=False, max_new_tokens=8))


def test_attentions_have_a_column_for_every_place():
    target = make_tiny_target(attn_implementation="eager")
    options = {"max_new_tokens": 12, "cache_implementation": "static", "max_cache_len": 40, "output_attentions": True}
    comparison = compare(target, make_tiny_draft(target), prompt_of(5), options, KNOBS, oracle=True, record=True)
    assert comparison.plain.attentions[0][0].shape[-1] == 40
    assert_close(comparison.plain.attentions, comparison.assisted.attentions, 1e-12)


@pytest.mark.parametrize("given", ["embeddings", "new tokens"])
def test_a_cache_too_small_for_the_text_is_refused_at_once(given):
    target, draft = pair("llama")
    cache = StaticCache(config=target.config, max_cache_len=20)
    call = {"inputs_embeds": target.get_input_embeddings()(prompt_of(9))}
    if given == "new tokens":
        target.generate(prompt_of(4), cache=cache, max_new_tokens=2, do_sample=False)
        call = {"input_ids": prompt_of(4), "attention_mask": torch.ones(1, 9, dtype=torch.long)}
    with pytest.raises(ValueError, match="holds 20 tokens at most, but the text may need 21; make it larger"):
        target.generate(**call, assistant_model=draft, cache=cache, max_new_tokens=13)


@pytest.mark.parametrize("contemplation", [0, 8])
def test_trees_may_reach_beyond_the_positions_of_a_table(contemplation):
    target = make_family("GPT2", max_position_embeddings=24, num_hidden_layers=3)
    draft = make_tiny_draft(target, target_hidden_state_indices=[1, 2, 3])
    options = {"do_sample": False, "max_new_tokens": 19, "cache_implementation": "static"}
    comparison = compare(target, draft, prompt_of(5), options, KNOBS | {"contemplation": contemplation}, record=True)
    assert comparison.assisted_ids.shape[1] == 24
    assert_identical(comparison)


def test_contemplate_rows_that_overflow_are_left_out():
    target, _ = pair("llama")
    draft = make_tiny_draft(target)
    with torch.no_grad():
        draft.future_channel.soft_prompts[:, 1] = 1.7e308  # as values; the projection behind them adds several
    options = {"do_sample": False, "max_new_tokens": 16, "cache_implementation": "static"}
    comparison = compare(target, draft, prompt_of(5), options, KNOBS | {"contemplation": 8}, record=False)
    assert_identical(comparison)
    assert comparison.statistics.contemplation_overflowed
