"""Continuing a text with a returned cache gives what plain `generate` gives with the same arguments.

Where the draft's state could be carried along, its proposals are those of a call without a cache, too.
"""

import copy
import functools
from unittest import mock

import pytest
import torch
from transformers import DynamicCache

from exactness import FP64_ROUNDING, assert_close, truly_fp64
from helpers import cached_tensors, make_tiny_draft, make_tiny_target
from transformers_confu import ConFuCandidateGenerator, confu_generation_config


KNOBS = {"tree_size": 16, "depth": 5, "branching": 4, "contemplation": 6}
PADDING = 4

# Transformers cuts no layers with windows, as they no longer hold the rows that would then be the last.
without_windows = pytest.mark.parametrize("pair", ["llama"], indirect=True)
both_ways = pytest.mark.parametrize("ids", ["all", "new"])


@pytest.fixture(params=["llama", "windows", "hybrid"])
def pair(request):
    """A target and a draft that knows its whole vocabulary."""
    with truly_fp64():
        yield make_pair(request.param)


@functools.cache
def make_pair(kind: str):
    target = make_tiny_target(kind)
    return target, make_tiny_draft(target)


def random_ids(length: int, seed: int = 0) -> torch.LongTensor:
    return torch.randint(2, 97, (1, length), generator=torch.Generator().manual_seed(seed))


def decode(target, ids, draft=None, knobs=KNOBS, do_sample=False, max_new_tokens=20, **call):
    """One turn, by plain `generate` if there is no draft; with one, `proposed` of the output lists its trees."""
    torch.manual_seed(0)
    options = {"do_sample": do_sample, "max_new_tokens": max_new_tokens, "return_dict_in_generate": True}
    if draft is None:
        return target.generate(ids, **options, **call)
    options |= {f"confu_{name}": value for name, value in knobs.items()}
    proposed, propose = [], ConFuCandidateGenerator.propose

    def note(*args, **kwargs):
        tree = propose(*args, **kwargs)
        proposed.append((tree.tokens.tolist(), tree.parents.tolist()))
        return tree

    with mock.patch.object(ConFuCandidateGenerator, "propose", note):
        output = target.generate(
            ids, assistant_model=draft, generation_config=confu_generation_config(target, **options), **call
        )
    output.proposed = proposed
    return output


def continued(text: torch.LongTensor, cache: DynamicCache, ids: str, mask: torch.LongTensor | None = None) -> dict:
    """Arguments that continue `text`: all of its ids, or those that are not cached with a mask for all."""
    mask = torch.ones_like(text) if mask is None else mask
    if ids == "all":
        return {"ids": text, "cache": cache, "attention_mask": mask}
    return {"ids": text[:, cache.get_seq_length() :], "cache": cache, "attention_mask": mask}


def assert_continues(target, arguments: dict, draft, state: str, **options):
    """Both decodings of the same arguments agree, in ids and in the cache they return; the assisted output."""
    plain = decode(target, **(arguments | {"cache": copy.deepcopy(arguments["cache"])}), **options)
    other = decode(target, **arguments, draft=draft, **options)
    assert draft.last_statistics.draft_state == state
    assert torch.equal(plain.sequences, other.sequences)
    assert_close(cached_tensors(plain.cache), cached_tensors(other.cache), FP64_ROUNDING)
    return other


def followed_by(output, length: int, seed: int = 0) -> torch.LongTensor:
    """The text of an output and some tokens more."""
    return torch.cat([output.sequences, random_ids(length, seed)], dim=-1)


@both_ways
@pytest.mark.parametrize("do_sample", [False, True])
def test_three_turns(pair, do_sample, ids):
    target, draft = pair
    text = random_ids(6)
    output = decode(target, text, draft, do_sample=do_sample)
    for turn in range(2):
        written = output.sequences if turn == 0 or ids == "all" else torch.cat([text, output.sequences[:, -20:]], -1)
        text = torch.cat([written, random_ids(3 + turn, seed=turn)], dim=-1)
        arguments = continued(text, output.cache, ids)
        output = assert_continues(target, arguments, draft, "carried", do_sample=do_sample)
        emitted = draft.last_statistics.emitted
        scratch = decode(target, text, draft, do_sample=do_sample)
        # With its state carried along, the draft proposes what it would have after reading everything anew.
        assert output.proposed == scratch.proposed
        assert draft.last_statistics.draft_state == "new"
        assert draft.last_statistics.emitted == emitted
        assert torch.equal(output.sequences[:, -20:], scratch.sequences[:, -20:])


def test_a_restarted_draft_proposes_otherwise(pair):
    # Else the equal proposals above would say nothing.
    target, draft = pair
    first = decode(target, random_ids(6), draft)
    text = followed_by(first, 3)
    del first.cache.confu_state
    restarted = assert_continues(target, continued(text, first.cache, "all"), draft, "restarted")
    assert restarted.proposed[0] != decode(target, text, draft).proposed[0]


@both_ways
def test_plain_turns_between_others(pair, ids):
    target, draft = pair
    first = decode(target, random_ids(6))
    text = followed_by(first, 4)
    second = assert_continues(target, continued(text, first.cache, ids), draft, "restarted")
    # From there on the draft has a state to carry.
    text = torch.cat([text, second.sequences[:, -20:], random_ids(2)], dim=-1)
    third = assert_continues(target, continued(text, second.cache, ids), draft, "carried")
    # A plain turn on a cache of ours, and after that the draft again, which has not seen what was written meanwhile.
    text = torch.cat([text, third.sequences[:, -20:], random_ids(4, seed=7)], dim=-1)
    fourth = decode(target, **continued(text, third.cache, ids))
    scratch = decode(target, text)
    assert torch.equal(fourth.sequences[:, -20:], scratch.sequences[:, -20:])
    text = followed_by(scratch, 2, seed=8)
    assert_continues(target, continued(text, fourth.cache, ids), draft, "restarted")


@without_windows
@both_ways
@pytest.mark.parametrize("removed", [1, 19])
def test_a_cropped_cache(pair, removed, ids):
    target, draft = pair
    first = decode(target, random_ids(6), draft)
    cache = first.cache
    cache.crop(-removed)
    text = torch.cat([first.sequences[:, : cache.get_seq_length()], random_ids(4)], dim=-1)
    assert_continues(target, continued(text, cache, ids), draft, "restarted")


@without_windows
def test_a_cropped_cache_that_has_grown_again(pair):
    # As long as before and with the same newest token, but another text: the carried state is not of this one.
    target, draft = pair
    # Forwards of one row each, here and below, so that rounding cannot tell the texts apart.
    first = decode(target, random_ids(6), draft, knobs=KNOBS | {"tree_size": 1, "contemplation": 0})
    cache, length = first.cache, first.cache.get_seq_length()
    cache.crop(-4)
    other = torch.cat([random_ids(3, seed=9), first.sequences[:, length - 1 : length]], dim=-1)
    assert not torch.equal(other, first.sequences[:, length - 4 : length])
    with torch.no_grad():
        for token in other.T:
            target(token[None], cache=cache)
    assert cache.get_seq_length() == length
    text = torch.cat([first.sequences[:, : length - 4], other, random_ids(2)], dim=-1)
    assert_continues(target, continued(text, cache, "all"), draft, "restarted")


@both_ways
def test_deep_copies_go_separate_ways(pair, ids):
    target, draft = pair
    first = decode(target, random_ids(6), draft)
    for seed, cache in enumerate([copy.deepcopy(first.cache), copy.deepcopy(first.cache), first.cache]):
        text = followed_by(first, 3, seed)
        second = assert_continues(target, continued(text, cache, ids), draft, "carried")
        assert second.proposed == decode(target, text, draft).proposed


@both_ways
@pytest.mark.parametrize("new", [0, 3])
def test_a_changed_last_token(pair, new, ids):
    # The newest token is not cached yet, so it may be replaced; nothing may remember the old one.
    target, draft = pair
    first = decode(target, random_ids(6), draft)
    text = torch.cat([first.sequences[:, :-1], (first.sequences[:, -1:] + 1) % 97, random_ids(new)], dim=-1)
    second = assert_continues(target, continued(text, first.cache, ids), draft, "carried")
    assert second.proposed == decode(target, text, draft).proposed


@both_ways
@pytest.mark.parametrize("length, max_new_tokens", [(6, 1), (6, 2), (1, 1)])
def test_a_first_turn_of_few_tokens(pair, length, max_new_tokens, ids):
    # One token is emitted by prefill: no round, no tree.
    target, draft = pair
    first = decode(target, random_ids(length), draft, max_new_tokens=max_new_tokens)
    text = followed_by(first, 3)
    second = assert_continues(target, continued(text, first.cache, ids), draft, "carried")
    assert second.proposed == decode(target, text, draft).proposed


@both_ways
@pytest.mark.parametrize("holes", [False, True])
def test_a_padded_first_turn(pair, holes, ids):
    target, draft = pair
    prompt = torch.cat([torch.zeros(1, PADDING, dtype=torch.long), random_ids(6)], dim=-1)
    mask = torch.ones_like(prompt)
    mask[:, :PADDING] = 0
    if holes:
        mask[:, [PADDING + 2, PADDING + 3]] = 0
    first = decode(target, prompt, draft, attention_mask=mask)
    text = followed_by(first, 5)
    mask = torch.nn.functional.pad(mask, (0, text.shape[1] - mask.shape[1]), value=1)
    if holes:
        mask[:, [-3, -5]] = 0
    second = assert_continues(target, continued(text, first.cache, ids, mask), draft, "carried")
    assert second.proposed == decode(target, text, draft, attention_mask=mask).proposed
    if not holes:
        assert second.proposed == decode(target, text[:, PADDING:], draft).proposed


@pytest.mark.parametrize("knobs", [{"contemplation": 0}, {"tree_size": 1}])
def test_other_knobs_in_the_next_turn(pair, knobs):
    target, draft = pair
    for before, after in ((KNOBS, KNOBS | knobs), (KNOBS | knobs, KNOBS)):
        first = decode(target, random_ids(6), draft, knobs=before)
        text = followed_by(first, 3)
        second = assert_continues(target, continued(text, first.cache, "all"), draft, "carried", knobs=after)
        assert second.proposed == decode(target, text, draft, knobs=after).proposed


def test_another_draft_starts_anew(pair):
    target, draft = pair
    first = decode(target, random_ids(6), draft)
    arguments = continued(followed_by(first, 3), first.cache, "all")
    assert_continues(target, arguments, make_tiny_draft(target, seed=5), "restarted")


def test_an_emptied_cache_holds_nothing_of_the_draft(pair):
    target, draft = pair
    cache = decode(target, random_ids(6), draft).cache
    cache.reset()
    draft = make_tiny_draft(target, hidden_size=16, head_dim=4)
    text = random_ids(8, seed=5)
    output = decode(target, text, draft, cache=cache)
    assert draft.last_statistics.draft_state == "new"
    scratch = decode(target, text, draft)
    assert output.proposed == scratch.proposed
    assert torch.equal(output.sequences, scratch.sequences)


def test_embeddings_behind_a_cache(pair):
    # Always the whole text, says Transformers, with the cached part cut off.
    target, draft = pair
    first = decode(target, random_ids(6), draft)
    text = followed_by(first, 4)
    with torch.no_grad():
        embeddings = target.get_input_embeddings()(text)
    assert_continues(target, {"ids": text, "inputs_embeds": embeddings, "cache": first.cache}, draft, "carried")


def test_an_interrupted_turn_can_be_repeated(pair):
    target, draft = pair
    first = decode(target, random_ids(6), draft)
    text, cache = followed_by(first, 3), first.cache
    proposed = decode(target, text, draft, cache=copy.deepcopy(cache)).proposed
    for number in (0, 1, 9):

        def interrupt(batch_id, input_ids, number=number):
            if input_ids.shape[0] >= text.shape[1] + number:
                raise KeyboardInterrupt
            return list(range(97))

        with pytest.raises(KeyboardInterrupt):
            decode(target, text, draft, cache=cache, prefix_allowed_tokens_fn=interrupt)
    assert assert_continues(target, continued(text, cache, "all"), draft, "carried").proposed == proposed
