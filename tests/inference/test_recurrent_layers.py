"""Targets with recurrent layers: trees whose nodes have states of their own. Which families: `test_targets`."""

import gc
import weakref

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from transformers import DynamicCache

from exactness import FP64_ROUNDING, assert_close, assert_identical, compare
from helpers import cached_tensors, make_family, make_tiny_draft, make_tiny_target
from transformers_confu.inference.draft_tree import DraftTree
from transformers_confu.inference.recurrent_layers import recurrent_mixers
from transformers_confu.inference.target import TargetRunner


PROMPT = torch.tensor([[3, 4, 5, 2, 7, 6, 8]])
TREE = {"tree_size": 12, "depth": 5, "branching": 3, "contemplation": 5}
GREEDY = {"do_sample": False, "max_new_tokens": 24}


@pytest.fixture
def target():
    # So few tokens that a random draft is often right.
    return make_tiny_target("hybrid", vocab_size=13)


@pytest.fixture
def draft(target):
    return make_tiny_draft(target)


@torch.no_grad()
def test_a_forward_over_a_tree_changes_no_state_until_a_node_is_kept(target, draft):
    """And then the state is that behind the node's path, whichever node it is."""
    runner = TargetRunner(target, draft.config, draft.future_channel)
    tokens, parents = torch.tensor([[9, 3, 4, 5, 6, 7]]), torch.tensor([[0, 0, 0, 1, 2, 2]])
    tree = DraftTree.from_parents(tokens, parents, torch.zeros(1, 6))
    visible, routed_by = torch.ones(1, 7, dtype=torch.bool), torch.zeros(1, draft.config.taps_size).double()
    for node in range(tree.size):
        path = [*tree.ancestors[0, node].nonzero()[:, 0].tolist()]
        cache, expected = DynamicCache(config=target.config), DynamicCache(config=target.config)
        for one in (cache, expected):
            target(PROMPT, cache=one)
        before = [tensor.clone() for tensor in cached_tensors(cache)]
        verified = runner.verify(tree, torch.tensor([[0, 1, 4]]), routed_by, cache, torch.tensor([7]), visible)
        runner.compact(cache, 7, [])
        assert all(torch.equal(one, other) for one, other in zip(cached_tensors(cache), before, strict=True))
        for token in tokens[0, path].tolist():
            target(torch.tensor([[token]]), cache=expected)
        verified.states.keep(node)
        states = [
            [state for tensor in (layer.conv_states, layer.recurrent_states) for state in tensor.values()]
            for held in (cache, expected)
            for layer in (held.layers[0], held.layers[3])
        ]
        assert_close(states[:2], states[2:], FP64_ROUNDING)


@torch.no_grad()
def test_states_of_a_tree_are_gone_when_nobody_holds_them(target, draft):
    """At once, as there may be gigabytes of them."""
    runner = TargetRunner(target, draft.config, draft.future_channel)
    cache = DynamicCache(config=target.config)
    target(PROMPT, cache=cache)
    tree = DraftTree.from_parents(torch.tensor([[9, 3, 4]]), torch.tensor([[0, 0, 1]]), torch.zeros(1, 3))
    routed_by, visible = torch.zeros(1, draft.config.taps_size).double(), torch.ones(1, 7, dtype=torch.bool)
    verified = runner.verify(tree, None, routed_by, cache, torch.tensor([7]), visible)
    states = weakref.ref(verified.states.layers[0].branches[1].recurrent_states[0])
    gc.disable()
    try:
        del verified
        assert states() is None
    finally:
        gc.enable()


def test_hooks_of_others_see_each_row_once(target, draft):
    """As such that steer a model by what passes through its layers; here one before a layer's module and one after."""
    plain = target.generate(PROMPT, **GREEDY)
    for mixer in recurrent_mixers(target).values():
        mixer.register_forward_pre_hook(
            lambda module, args, kwargs: (args, kwargs | {"hidden_states": 1.5 * kwargs["hidden_states"] + 0.1}),
            with_kwargs=True,
        )
        mixer.register_forward_hook(lambda module, args, output: 0.5 * output - 0.2)
    assert not torch.equal(plain, target.generate(PROMPT, **GREEDY))
    comparison = compare(target, draft, PROMPT, GREEDY, TREE, oracle=True)
    assert_identical(comparison)


@pytest.mark.parametrize("change", ["class", "hook of all modules"])
def test_what_changes_the_layers_between_two_calls_is_felt(target, draft, monkeypatch, change):
    plain = compare(target, draft, PROMPT, GREEDY, TREE).plain.sequences
    mixer_class = type(recurrent_mixers(target)[0])
    own, handle = mixer_class.forward, None
    if change == "class":
        monkeypatch.setattr(
            mixer_class, "forward", lambda self, *args, **kwargs: 2 * own(self, *args, **kwargs).tanh()
        )
    else:
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, output: 0.5 * output - 0.2 if isinstance(module, mixer_class) else None
        )
    try:
        comparison = compare(target, draft, PROMPT, GREEDY, TREE, oracle=True)
    finally:
        if handle is not None:
            handle.remove()
    assert not torch.equal(comparison.plain.sequences, plain)
    assert_identical(comparison)


def test_no_hook_is_left_behind(target, draft):
    target.generate(PROMPT, assistant_model=draft, **GREEDY)
    assert not any(mixer._forward_hooks or mixer._forward_pre_hooks for mixer in recurrent_mixers(target).values())


def test_an_offloaded_hybrid(target, draft):
    plain = target.generate(PROMPT, **GREEDY)
    cpu_offload(target, torch.device("cpu"))
    comparison = compare(target, draft, PROMPT, GREEDY, TREE, oracle=True)
    assert comparison.first_difference() is None and torch.equal(comparison.assisted_ids, plain)


def test_contemplate_rows_that_overflow_leave_no_trace(target, draft):
    draft.future_channel.contemplate_token.experts.data.fill_(1e300)  # whose square is infinite
    comparison = compare(target, draft, PROMPT, GREEDY, TREE, oracle=True)
    assert comparison.statistics.contemplation_overflowed
    assert_identical(comparison)
    assert_close(cached_tensors(comparison.plain.cache), cached_tensors(comparison.assisted.cache), FP64_ROUNDING)


def test_other_assistants_are_still_refused_by_transformers(target):
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        target.generate(PROMPT, assistant_model=make_tiny_target(vocab_size=13), **GREEDY)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        target.generate(PROMPT, prompt_lookup_num_tokens=3, **GREEDY)


def test_a_cache_without_recurrent_layers_is_refused(target, draft):
    with pytest.raises(ValueError, match=r"got a DynamicCache without the target's recurrent layers; leave .*config="):
        target.generate(PROMPT, assistant_model=draft, cache=DynamicCache(), **GREEDY)


@torch.no_grad()
def test_weights_are_not_read_for_every_level(target, draft):
    """Once for the root, and once for all levels behind it."""
    runner = TargetRunner(target, draft.config, draft.future_channel)
    chain = torch.tensor([[9, 3, 4, 5, 6, 7]])
    tree = DraftTree.from_parents(chain, torch.tensor([[0, 0, 1, 2, 3, 4]]), torch.zeros(1, 6))
    routed_by, visible = torch.zeros(1, draft.config.taps_size).double(), torch.ones(1, 7, dtype=torch.bool)
    cache, rows = DynamicCache(config=target.config), []
    target(PROMPT, cache=cache)
    for times in range(2):  # the first forward finds out which projection is the last
        runner.verify(tree, None, routed_by, cache, torch.tensor([7]), visible)
        runner.compact(cache, 7, [])
        if times == 0:
            mixer = next(iter(recurrent_mixers(target).values()))
            for projection in (mixer.in_proj_qkv, mixer.in_proj_b, mixer.out_proj):
                projection.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[:2].numel()))
    assert sorted(rows) == [1] * 3 + [5] * 3


def test_a_cache_that_others_have_recorded():
    """Transformers' own assisted generation leaves layers of convolutions that keep more than the next token needs."""
    target = make_family("Lfm2", layer_types=["conv", "full_attention", "conv", "conv", "full_attention"])
    draft, options = make_tiny_draft(target), {"do_sample": False, "max_new_tokens": 12}
    first = target.generate(PROMPT, prompt_lookup_num_tokens=3, return_dict_in_generate=True, **options)
    assert first.cache.layers[0].record_past
    text = torch.cat([first.sequences, PROMPT[:, :3]], dim=1)
    options["attention_mask"] = torch.ones_like(text)
    plain = target.generate(text, **options)
    assert torch.equal(target.generate(text, cache=first.cache, assistant_model=draft, **options), plain)
    assert not first.cache.layers[0].record_past
