"""What plain `generate` returns, streams, calls and stops at, so does assisted decoding. Tiny targets in fp64."""

import copy
import functools
import math

import pytest
import torch
from transformers import (
    LogitsProcessor,
    MaxLengthCriteria,
    StoppingCriteria,
)

from exactness import FP64_ROUNDING, Oracle, assert_close, assert_identical, compare, truly_fp64
from helpers import Recorder, cached_tensors, make_tiny_draft, make_tiny_target
from transformers_confu import confu_generation_config


NEW_TOKENS = 24
KNOBS = {"tree_size": 16, "depth": 5, "branching": 4, "contemplation": 6}
GREEDY = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
SAMPLED = {"max_new_tokens": NEW_TOKENS, "do_sample": True, "top_k": 20}

greedy_and_sampled = pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
draft_and_oracle = pytest.mark.parametrize("oracle", [False, True], ids=["draft", "oracle"])


@pytest.fixture(params=["llama", "windows", "hybrid"])
def kind(request):
    """Which target `tiny` gives."""
    with truly_fp64():
        yield request.param


@functools.cache
def tiny(kind: str, attention: str = "sdpa"):
    """A target and a draft for it."""
    target = make_tiny_target(kind, attn_implementation=attention)
    return target, make_tiny_draft(target, draft_vocab_size=60)


def random_ids(length: int, seed: int = 0) -> torch.LongTensor:
    return torch.randint(2, 97, (1, length), generator=torch.Generator().manual_seed(seed))


PROMPT = random_ids(7)


@functools.cache
def greedy_text(kind: str) -> list[int]:
    """What plain decoding writes after `PROMPT` with nothing to stop it."""
    return tiny(kind)[0].generate(PROMPT, **GREEDY)[0, PROMPT.shape[1] :].tolist()


def assisted(target, draft, *args, oracle_text=None, knobs=KNOBS, call=None, **options):
    """An assisted call whose trees, if `oracle_text` is given, hold that text; it may go on where decoding stops."""
    config = confu_generation_config(target, **options, **{f"confu_{name}": value for name, value in knobs.items()})
    arguments = {"assistant_model": draft, "generation_config": config} | (call or {})
    if oracle_text is None:
        return target.generate(*args, **arguments)
    with Oracle(PROMPT[0].tolist() + oracle_text, PROMPT.shape[1] + options["max_new_tokens"]).proposing():
        return target.generate(*args, **arguments)


# --- returned fields


@draft_and_oracle
@greedy_and_sampled
@pytest.mark.parametrize("contemplation", [0, 16])
def test_all_fields_together(kind, contemplation, options, oracle):
    fields = {"output_logits": True, "output_attentions": True}
    knobs = KNOBS | {"contemplation": contemplation}
    comparison = compare(*tiny(kind, "eager"), PROMPT, options | fields, knobs, oracle=oracle)
    assert_identical(comparison)
    plain, other = comparison.plain, comparison.assisted
    assert type(plain) is type(other) and plain.keys() == other.keys()
    assert_close(plain.logits, other.logits, 1e-6)  # Transformers rounds them to fp32
    assert_close(plain.attentions, other.attentions, FP64_ROUNDING)
    assert plain.cache.get_seq_length() == other.cache.get_seq_length()
    assert_close(cached_tensors(plain.cache), cached_tensors(other.cache), FP64_ROUNDING)


def test_some_of_the_hidden_states(kind):
    target, draft = tiny(kind)
    options = GREEDY | {"return_dict_in_generate": True, "output_hidden_states": [0, 3]}
    plain = target.generate(PROMPT, **options)
    other = assisted(target, draft, PROMPT, **options)
    assert len(plain.hidden_states) == len(other.hidden_states)
    for one, two in zip(plain.hidden_states, other.hidden_states, strict=True):
        assert [states is None for states in one] == [states is None for states in two]
        assert_close(*(tuple(s for s in states if s is not None) for states in (one, two)), FP64_ROUNDING)


# --- where it stops


@pytest.mark.parametrize("position", range(1, 12, 2))
def test_eos_inside_an_accepted_path(kind, position):
    # The tree goes on behind the EOS: nothing of that may be emitted, cached or counted.
    target, draft = tiny(kind)
    text = greedy_text(kind)
    options = GREEDY | {"eos_token_id": text[position], "return_dict_in_generate": True}
    other = assisted(target, draft, PROMPT, oracle_text=text, **options)
    assert torch.equal(target.generate(PROMPT, **options).sequences, other.sequences)
    assert other.cache.get_seq_length() == other.sequences.shape[1] - 1
    emitted = other.sequences.shape[1] - PROMPT.shape[1]
    assert sum(draft.last_statistics.emitted) == emitted - 1


def test_the_first_token_can_be_the_last(kind):
    target, draft = tiny(kind)
    options = GREEDY | {"eos_token_id": greedy_text(kind)[0]}
    assert torch.equal(target.generate(PROMPT, **options), assisted(target, draft, PROMPT, **options))
    assert draft.last_statistics.rounds == 0
    assert math.isnan(draft.last_statistics.tau)


@pytest.mark.parametrize("max_time, new_tokens", [(0.0, 1), (1e9, NEW_TOKENS)])
def test_maximal_time(kind, max_time, new_tokens):
    target, draft = tiny(kind)
    other = assisted(target, draft, PROMPT, max_time=max_time, **GREEDY)
    assert torch.equal(target.generate(PROMPT, max_time=max_time, **GREEDY), other)
    assert other.shape[1] == PROMPT.shape[1] + new_tokens


class StopOnScores(StoppingCriteria):
    """Stops when the best scores so far add up to enough; notes what it was called with."""

    def __init__(self, enough: float):
        self.enough = enough
        self.calls = []

    def __call__(self, input_ids, scores, **kwargs):
        total = sum(step.max().item() for step in scores)
        self.calls.append((input_ids[0].tolist(), len(scores), round(total, 3)))
        return torch.tensor([total > self.enough])


@draft_and_oracle
def test_a_criterion_that_reads_scores(kind, oracle):
    target, draft = tiny(kind)
    options = GREEDY | {"return_dict_in_generate": True, "output_scores": True}
    everything = target.generate(PROMPT, **options)
    enough = sum(step.max().item() for step in everything.scores[:13])
    plain_criterion, other_criterion = StopOnScores(enough), StopOnScores(enough)
    plain = target.generate(PROMPT, stopping_criteria=[plain_criterion], **options)
    call = {"stopping_criteria": [other_criterion]}
    text = greedy_text(kind) if oracle else None
    other = assisted(target, draft, PROMPT, oracle_text=text, call=call, **options)
    assert torch.equal(plain.sequences, other.sequences)
    assert plain_criterion.calls == other_criterion.calls
    assert 5 < len(other_criterion.calls) < NEW_TOKENS


@pytest.mark.parametrize("length", [PROMPT.shape[1] + 9, PROMPT.shape[1] + 40])
def test_a_limit_of_the_callers_own_stands_in_for_that_of_the_config(kind, length):
    target, draft = tiny(kind)
    call = {"stopping_criteria": [MaxLengthCriteria(length)]}
    plain = target.generate(PROMPT, **GREEDY, **call)
    assert plain.shape[1] == length
    options = {"max_length": length, "do_sample": False}
    expected = assisted(target, draft, PROMPT, **options)
    rounds = draft.last_statistics
    assert torch.equal(assisted(target, draft, PROMPT, call=call, **GREEDY), plain)
    assert torch.equal(expected, plain)
    assert draft.last_statistics.tree_nodes == rounds.tree_nodes  # trees as deep as the text may still grow


# --- what is called on the way


class Notebook(LogitsProcessor):
    """A processor with a state: each call shifts the scores by what all earlier calls saw."""

    def __init__(self):
        self.prefixes = []

    def __call__(self, input_ids, scores):
        self.prefixes.append(input_ids[0].tolist())
        return scores.roll(len(self.prefixes) % 5, dims=-1) + scores.new_tensor(sum(self.prefixes[-1]) % 7)


@greedy_and_sampled
@draft_and_oracle
def test_a_processor_is_called_once_per_token_with_the_true_prefix(kind, options, oracle):
    notebooks = []

    def call():
        notebooks.append(Notebook())
        return {"logits_processor": [notebooks[-1]]}

    comparison = compare(*tiny(kind), PROMPT, options, KNOBS, oracle=oracle, call=call)
    assert_identical(comparison)
    assert notebooks[0].prefixes == notebooks[1].prefixes
    assert len(notebooks[1].prefixes) == NEW_TOKENS
    if oracle:
        assert comparison.statistics.tau > 1.5


@greedy_and_sampled
@draft_and_oracle
def test_streaming(kind, options, oracle):
    recorders = []

    def call():
        recorders.append(Recorder())
        return {"streamer": recorders[-1]}

    comparison = compare(
        *tiny(kind), PROMPT, options | {"eos_token_id": greedy_text(kind)[17]}, KNOBS, oracle=oracle, call=call
    )
    assert_identical(comparison)
    assert recorders[0].events == recorders[1].events


# --- prompts of every form


@pytest.mark.parametrize("chunk_size", [1, 3, 50])
def test_chunked_prefill(kind, chunk_size):
    prompt = random_ids(20, seed=3)
    comparison = compare(*tiny(kind), prompt, SAMPLED | {"prefill_chunk_size": chunk_size}, KNOBS)
    assert_identical(comparison)
    whole = compare(*tiny(kind), prompt, SAMPLED, KNOBS)
    assert comparison.statistics.emitted == whole.statistics.emitted  # the draft gets the taps of every chunk


MASKS = {
    "left padding": [0, 0, 0, 1, 1, 1, 1],
    "holes": [0, 1, 0, 1, 1, 0, 1],
    "right padding": [1, 1, 1, 1, 1, 0, 0],
    "one token": [0, 0, 0, 0, 0, 0, 1],
    "nothing": [0, 0, 0, 0, 0, 0, 0],
}


@draft_and_oracle
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", MASKS)
def test_masked_prompts(kind, mask, attention, oracle):
    def call():
        return {"attention_mask": torch.tensor([MASKS[mask]])}

    assert_identical(compare(*tiny(kind, attention), PROMPT, SAMPLED, KNOBS, oracle=oracle, call=call))


@pytest.mark.parametrize("with_ids", [True, False])
@pytest.mark.parametrize("mask", [None, "left padding", "holes"])
def test_embedded_prompts(kind, with_ids, mask):
    target, draft = tiny(kind)
    with torch.no_grad():
        embeddings = target.get_input_embeddings()(PROMPT) + 0.1  # of no token

    def call():
        return {"inputs_embeds": embeddings} | ({"attention_mask": torch.tensor([MASKS[mask]])} if mask else {})

    comparison = compare(target, draft, PROMPT if with_ids else None, SAMPLED, KNOBS, call=call)
    assert_identical(comparison)
    assert comparison.assisted_ids.shape[1] == NEW_TOKENS + (PROMPT.shape[1] if with_ids else 0)


def test_positions_of_the_callers_own(kind):
    def call():
        return {"position_ids": torch.arange(3, 3 + 2 * PROMPT.shape[1], 2)[None]}

    assert_identical(compare(*tiny(kind), PROMPT, SAMPLED, KNOBS, call=call))


# --- statistics


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("contemplation", [0, 4, 99])
def test_statistics_can_be_recounted(kind, contemplation, eos):
    target, draft = tiny(kind)
    text = greedy_text(kind)
    options = GREEDY | ({"eos_token_id": text[15]} if eos else {})
    with Oracle(PROMPT[0].tolist() + text, PROMPT.shape[1] + NEW_TOKENS, seed=2).proposing() as oracle:
        ids = assisted(target, draft, PROMPT, knobs=KNOBS | {"contemplation": contemplation}, **options)
    statistics, trees = draft.last_statistics, oracle.trees

    new = ids[0, PROMPT.shape[1] :].tolist()
    written, emitted, accepted = 1, [], []  # prefill emits the first
    for tree, path in zip(trees, oracle.paths, strict=True):
        tokens = new[written : written + len(path)]
        children, node, count = tree.children()[0], 0, 0
        while count < len(tokens) and (node := children.get((node, tokens[count]))):
            count += 1
        written += len(path)
        emitted.append(len(tokens))
        accepted.append(count)
    assert written == len(new)
    assert statistics.emitted == emitted and statistics.accepted == accepted
    assert statistics.accepted_by_depth == [sum(a > d for a in accepted) for d in range(max(accepted))]
    assert statistics.rounds == len(trees)
    assert statistics.tau == (len(new) - 1) / len(trees) > 1.5
    assert statistics.tree_nodes == sum(tree.size for tree in trees)
    assert statistics.contemplate_rows <= sum(min(contemplation, tree.size) for tree in trees)
    assert (statistics.contemplate_rows > 0) == (contemplation > 0)
    layer_bytes = 2 * 2 * target.config.head_dim * 8  # of a row: keys and values, heads, head size, fp64
    # Of a delta net: four products of a convolution over 64 channels; four heads of 8 x 8, in fp32.
    kinds = getattr(target.config, "layer_types", None) or ["full_attention"] * 5
    length = PROMPT.shape[1] + len(new) - 1
    state_bytes = kinds.count("linear_attention") * (4 * 64 * 8 + 4 * 8 * 8 * 4)
    held = {"sliding_attention": min(length, 5), "full_attention": length, "linear_attention": 0}
    assert statistics.target_cache_bytes == sum(held[kind] for kind in kinds) * layer_bytes + state_bytes
    slots = draft.config.num_soft_prompts if contemplation else 0
    most = max(t.size + min(contemplation, t.size) for t in trees)
    row_bytes = sum(kind != "linear_attention" for kind in kinds) * layer_bytes
    assert statistics.transient_cache_bytes == (most + slots) * row_bytes + most * state_bytes
    seen = length - emitted[-1]  # true rows that the last tree grew from
    assert statistics.draft_cache_bytes == seen * 2 * draft.config.num_key_value_heads * draft.config.head_dim * 8
    assert statistics.draft_state == "new"
    assert f"tau {statistics.tau:.2f}" in str(statistics)


# --- side by side, and cut short


def test_inference_mode(kind):
    target, draft = tiny(kind)
    if kind == "hybrid":
        pytest.skip("plain generate cannot go on outside of inference mode with states that were made in it")
    with torch.inference_mode():
        first = assisted(target, draft, PROMPT, return_dict_in_generate=True, **GREEDY)
    longer = torch.cat([first.sequences.clone(), random_ids(2)], dim=-1)
    cache = first.cache
    assert torch.equal(
        target.generate(longer, **GREEDY),
        assisted(target, draft, longer, call={"cache": cache}, **GREEDY),
    )
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("layer", [0, 4])
@pytest.mark.parametrize("forward", [1, 2, 3, 5])  # prefill, contemplation behind the prompt, rounds
def test_an_interrupt_leaves_the_cache_as_it_was(kind, forward, layer):
    target, draft = tiny(kind)
    first = target.generate(PROMPT, return_dict_in_generate=True, **GREEDY)
    cache, text = first.cache, torch.cat([first.sequences, random_ids(3)], dim=-1)
    length = cache.get_seq_length()
    before = copy.deepcopy(cached_tensors(cache))
    calls = -math.inf

    def interrupt(module, args):
        nonlocal calls
        calls += 1
        if calls == forward:
            raise KeyboardInterrupt

    # In the middle of a layer: those above hold no new rows yet.
    hook = target.model.layers[layer].mlp.register_forward_pre_hook(interrupt)
    assisted(target, draft, PROMPT, **GREEDY)  # or the forwards would be those of the self-check, as there is a hook
    calls = 0
    try:
        with pytest.raises(KeyboardInterrupt):
            assisted(target, draft, text, call={"cache": cache}, **GREEDY)
    finally:
        hook.remove()
    assert cache.get_seq_length() == length
    assert all(torch.equal(one, other) for one, other in zip(cached_tensors(cache), before, strict=True))
    again = assisted(target, draft, text, call={"cache": cache}, **GREEDY)
    assert torch.equal(again, target.generate(text, **GREEDY))
