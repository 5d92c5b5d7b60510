"""Continuing a text with a returned cache gives what plain `generate` gives with the same arguments.

Where the draft's state could be carried along, its proposals are those of a call without a cache, too.
"""

import copy
import functools
import sys
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
without_windows = pytest.mark.parametrize("usual_kind", ["llama"], indirect=True)
both_ways = pytest.mark.parametrize("ids", ["all", "new"])


@pytest.fixture(autouse=True, params=["llama", "windows", "hybrid"])
def usual_kind(request):
    """Which target `tiny` gives."""
    with truly_fp64(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "USUAL_KIND", request.param)
        yield request.param


USUAL_KIND = "llama"


def tiny():
    """A target and a draft that knows its whole vocabulary."""
    return _tiny(USUAL_KIND)


@functools.cache
def _tiny(kind: str):
    target = make_tiny_target(kind)
    return target, make_tiny_draft(target)


def random_ids(length: int, seed: int = 0) -> torch.LongTensor:
    return torch.randint(2, 97, (1, length), generator=torch.Generator().manual_seed(seed))


def decode(
    ids,
    draft=None,
    target=None,
    knobs=KNOBS,
    do_sample=False,
    max_new_tokens=20,
    seed=0,
    prefill_chunk_size=None,
    **call,
):
    """One turn, by plain `generate` if there is no draft; with one, `proposed` of the output lists its trees."""
    target = target or tiny()[0]
    torch.manual_seed(seed)
    options = {"do_sample": do_sample, "max_new_tokens": max_new_tokens, "return_dict_in_generate": True}
    options |= {"prefill_chunk_size": prefill_chunk_size} if prefill_chunk_size else {}
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


def assert_continues(arguments: dict, draft, state: str, **options) -> torch.LongTensor:
    """Both decodings of the same arguments agree, in ids and in the cache they return; the assisted text."""
    plain = decode(**(arguments | {"cache": copy.deepcopy(arguments["cache"])}), **options)
    other = decode(**arguments, draft=draft, **options)
    assert draft.last_statistics.draft_state == state
    assert torch.equal(plain.sequences, other.sequences)
    assert_close(cached_tensors(plain.cache), cached_tensors(other.cache), FP64_ROUNDING)
    return other


@both_ways
@pytest.mark.parametrize("do_sample", [False, True])
def test_three_turns(do_sample, ids):
    target, draft = tiny()
    text, cache = random_ids(6), None
    for turn in range(3):
        if cache is None:
            output = decode(text, draft, target, do_sample=do_sample)
        else:
            arguments = continued(text, cache, ids)
            output = assert_continues(arguments, draft, "carried", do_sample=do_sample, target=target)
        rounds = draft.last_statistics
        scratch = decode(text, draft, target, do_sample=do_sample)
        # With its state carried along, the draft proposes what it would have after reading everything anew.
        assert output.proposed == scratch.proposed
        assert draft.last_statistics.draft_state == "new"
        assert draft.last_statistics.emitted == rounds.emitted
        assert draft.last_statistics.tau == rounds.tau
        assert draft.last_statistics.contemplate_rows == rounds.contemplate_rows
        new = output.sequences if ids == "all" or turn == 0 else output.sequences[:, arguments["ids"].shape[1] :]
        whole = new if ids == "all" or turn == 0 else torch.cat([text, new], dim=-1)
        assert torch.equal(whole, scratch.sequences)
        text, cache = torch.cat([whole, random_ids(3 + turn, seed=turn)], dim=-1), output.cache


def test_a_restarted_draft_proposes_otherwise():
    # Else the equal proposals above would say nothing.
    _, draft = tiny()
    first = decode(random_ids(6), draft)
    text = torch.cat([first.sequences, random_ids(3)], dim=-1)
    del first.cache.confu_state
    restarted = assert_continues(continued(text, first.cache, "all"), draft, "restarted")
    assert restarted.proposed[0] != decode(text, draft).proposed[0]


@both_ways
def test_a_cache_of_plain_generate(ids):
    _, draft = tiny()
    first = decode(random_ids(6))
    text = torch.cat([first.sequences, random_ids(4)], dim=-1)
    second = assert_continues(continued(text, first.cache, ids), draft, "restarted")
    # From there on the draft has a state to carry.
    whole = second.sequences if ids == "all" else torch.cat([text[:, : -second_new(second, 20)], second.sequences], -1)
    text = torch.cat([whole, random_ids(2)], dim=-1)
    assert_continues(continued(text, second.cache, ids), draft, "carried")


def second_new(output, max_new_tokens: int) -> int:
    """How many ids were passed to the call that returned `output`."""
    return output.sequences.shape[1] - max_new_tokens


@without_windows
@both_ways
@pytest.mark.parametrize("removed", [1, 5, 19])
def test_a_cropped_cache(removed, ids):
    _, draft = tiny()
    first = decode(random_ids(6), draft)
    cache = first.cache
    cache.crop(-removed)
    text = torch.cat([first.sequences[:, : cache.get_seq_length()], random_ids(4)], dim=-1)
    assert_continues(continued(text, cache, ids), draft, "restarted")


@without_windows
def test_a_cropped_cache_that_has_grown_again():
    # As long as before and with the same newest token, but another text: the carried state is not of this one.
    target, draft = tiny()
    # Forwards of one row each, here and below, so that rounding cannot tell the texts apart.
    first = decode(random_ids(6), draft, knobs=KNOBS | {"tree_size": 1, "contemplation": 0})
    cache, length = first.cache, first.cache.get_seq_length()
    cache.crop(-4)
    other = torch.cat([random_ids(3, seed=9), first.sequences[:, length - 1 : length]], dim=-1)
    assert not torch.equal(other, first.sequences[:, length - 4 : length])
    with torch.no_grad():
        for token in other.T:
            target(token[None], cache=cache)
    assert cache.get_seq_length() == length
    text = torch.cat([first.sequences[:, : length - 4], other, random_ids(2)], dim=-1)
    assert_continues(continued(text, cache, "all"), draft, "restarted")


@both_ways
def test_deep_copies_go_separate_ways(ids):
    _, draft = tiny()
    first = decode(random_ids(6), draft)
    texts = [torch.cat([first.sequences, random_ids(3, seed=seed)], dim=-1) for seed in (1, 2, 3)]
    caches = [copy.deepcopy(first.cache), copy.deepcopy(first.cache), first.cache]
    for text, cache in zip(texts, caches, strict=True):
        second = assert_continues(continued(text, cache, ids), draft, "carried")
        assert second.proposed == decode(text, draft).proposed


@both_ways
@pytest.mark.parametrize("new", [0, 3])
def test_a_changed_last_token(new, ids):
    # The newest token is not cached yet, so it may be replaced; nothing may remember the old one.
    _, draft = tiny()
    first = decode(random_ids(6), draft)
    text = torch.cat([first.sequences[:, :-1], (first.sequences[:, -1:] + 1) % 97, random_ids(new)], dim=-1)
    second = assert_continues(continued(text, first.cache, ids), draft, "carried")
    assert second.proposed == decode(text, draft).proposed


@both_ways
def test_going_on_without_new_tokens(ids):
    _, draft = tiny()
    whole = decode(random_ids(6), max_new_tokens=30).sequences
    first = decode(random_ids(6), draft, max_new_tokens=12)
    second = assert_continues(continued(first.sequences, first.cache, ids), draft, "carried", max_new_tokens=18)
    assert torch.equal(second.sequences[:, -18:], whole[:, -18:])


@both_ways
@pytest.mark.parametrize("length, max_new_tokens", [(6, 1), (6, 2), (1, 1)])
def test_a_first_turn_of_few_tokens(length, max_new_tokens, ids):
    # One token is emitted by prefill: no round, no tree.
    _, draft = tiny()
    first = decode(random_ids(length), draft, max_new_tokens=max_new_tokens)
    text = torch.cat([first.sequences, random_ids(3)], dim=-1)
    second = assert_continues(continued(text, first.cache, ids), draft, "carried")
    assert second.proposed == decode(text, draft).proposed


@both_ways
@pytest.mark.parametrize("holes", [False, True])
def test_a_padded_first_turn(holes, ids):
    _, draft = tiny()
    prompt = torch.cat([torch.zeros(1, PADDING, dtype=torch.long), random_ids(6)], dim=-1)
    mask = torch.ones_like(prompt)
    mask[:, :PADDING] = 0
    if holes:
        mask[:, [PADDING + 2, PADDING + 3]] = 0
    first = decode(prompt, draft, attention_mask=mask)
    text = torch.cat([first.sequences, random_ids(5)], dim=-1)
    mask = torch.nn.functional.pad(mask, (0, text.shape[1] - mask.shape[1]), value=1)
    if holes:
        mask[:, [-3, -5]] = 0
    second = assert_continues(continued(text, first.cache, ids, mask), draft, "carried")
    assert second.proposed == decode(text, draft, attention_mask=mask).proposed
    if not holes:
        assert second.proposed == decode(text[:, PADDING:], draft).proposed


@pytest.mark.parametrize("knobs", [{"contemplation": 0}, {"contemplation": 16}, {"tree_size": 1}])
def test_other_knobs_in_the_next_turn(knobs):
    _, draft = tiny()
    for before, after in ((KNOBS, KNOBS | knobs), (KNOBS | knobs, KNOBS)):
        first = decode(random_ids(6), draft, knobs=before)
        text = torch.cat([first.sequences, random_ids(3)], dim=-1)
        second = decode(text, draft, knobs=after, cache=first.cache)
        assert draft.last_statistics.draft_state == "carried"
        assert torch.equal(second.sequences, decode(text).sequences)
        assert second.proposed == decode(text, draft, knobs=after).proposed


def test_another_draft_starts_anew():
    target, draft = tiny()
    other_draft = make_tiny_draft(target, seed=5)
    first = decode(random_ids(6), draft)
    text = torch.cat([first.sequences, random_ids(3)], dim=-1)
    assert_continues(continued(text, first.cache, "all"), other_draft, "restarted")


@both_ways
@pytest.mark.parametrize("turns", [1, 2])
def test_the_returned_cache_in_plain_generate(turns, ids):
    _, draft = tiny()
    output = decode(random_ids(6), draft)
    for turn in range(turns - 1):
        text = torch.cat([output.sequences, random_ids(3, seed=turn)], dim=-1)
        output = decode(text, draft, cache=output.cache)
    text = torch.cat([output.sequences, random_ids(4, seed=7)], dim=-1)
    second = decode(**continued(text, output.cache, ids))
    assert torch.equal(second.sequences[:, -20:], decode(text).sequences[:, -20:])
    # And after that with the draft again, which has not seen what was written meanwhile.
    whole = decode(text).sequences
    text = torch.cat([whole, random_ids(2, seed=8)], dim=-1)
    assert_continues(continued(text, second.cache, ids), draft, "restarted")


@pytest.mark.parametrize("other_sizes", [False, True])
def test_an_emptied_cache_holds_nothing_of_the_draft(other_sizes):
    target, draft = tiny()
    cache = decode(random_ids(6), draft).cache
    cache.reset()
    if other_sizes:
        draft = make_tiny_draft(target, hidden_size=16, head_dim=4)
    text = random_ids(8, seed=5)
    output = decode(text, draft, cache=cache)
    assert draft.last_statistics.draft_state == "new"
    scratch = decode(text, draft)
    assert output.proposed == scratch.proposed
    assert torch.equal(output.sequences, scratch.sequences)
    assert output.cache.confu_state.length == output.cache.get_seq_length()


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_chunked_prefill_behind_a_cache(chunk_size):
    _, draft = tiny()
    first = decode(random_ids(6), draft)
    text = torch.cat([first.sequences, random_ids(5)], dim=-1)
    arguments = continued(text, first.cache, "all")
    second = assert_continues(arguments, draft, "carried", prefill_chunk_size=chunk_size)
    assert second.proposed == decode(text, draft).proposed


def test_embeddings_behind_a_cache():
    # Always the whole text, says Transformers, with the cached part cut off.
    target, draft = tiny()
    first = decode(random_ids(6), draft)
    text = torch.cat([first.sequences, random_ids(4)], dim=-1)
    with torch.no_grad():
        embeddings = target.get_input_embeddings()(text)
    cache = first.cache
    plain = decode(text, inputs_embeds=embeddings, cache=copy.deepcopy(cache))
    other = decode(text, draft, inputs_embeds=embeddings, cache=cache)
    assert torch.equal(plain.sequences, other.sequences)
    assert draft.last_statistics.draft_state == "carried"


def test_an_interrupted_turn_can_be_repeated():
    target, draft = tiny()
    first = decode(random_ids(6), draft)
    text = torch.cat([first.sequences, random_ids(3)], dim=-1)
    cache = first.cache
    proposed = decode(text, draft, cache=copy.deepcopy(cache)).proposed
    for number in (0, 1, 4, 9):

        def interrupt(batch_id, input_ids, number=number):
            if input_ids.shape[0] >= text.shape[1] + number:
                raise KeyboardInterrupt
            return list(range(97))

        with pytest.raises(KeyboardInterrupt):
            decode(text, draft, cache=cache, prefix_allowed_tokens_fn=interrupt)
    assert assert_continues(continued(text, cache, "all"), draft, "carried").proposed == proposed
