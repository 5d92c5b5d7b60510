"""Where the text could silently differ: numbers that overflow, position tables that end, randomness of training."""

import pytest
import torch
from transformers import DynamicCache

from exactness import compare
from helpers import make_family, make_tiny_draft, make_tiny_target
from transformers_confu import ConFuCandidateGenerator, confu_generation_config


PROMPT = torch.tensor([[3, 4, 5, 2, 7, 6, 8]])
KNOBS = {"tree_size": 12, "depth": 5, "branching": 3, "contemplation": 5}
GREEDY = {"do_sample": False, "max_new_tokens": 24}


def generate(target, draft=None, **options):
    config = confu_generation_config(target, **GREEDY | options)
    return target.generate(PROMPT, assistant_model=draft, generation_config=config)


def assert_same(target, draft, **knobs):
    for do_sample in (False, True):
        options = {"do_sample": do_sample, "max_new_tokens": 24}
        comparison = compare(target, draft, PROMPT, options, KNOBS | knobs, record=False)
        assert comparison.first_difference() is None
        assert torch.equal(comparison.plain_state, comparison.assisted_state)
    return comparison.statistics


# Numbers that are not finite


@pytest.mark.parametrize(
    "name",
    ["soft_prompts", "contemplate_token.router.weight", "contemplate_token.experts", "future_projection.weight"],
)
def test_a_channel_that_is_not_finite_is_refused(name):
    target = make_tiny_target()
    draft = make_tiny_draft(target)
    generate(target, draft, confu_tree_size=4)
    parameter = draft.future_channel.get_parameter(name)
    with torch.no_grad():
        parameter.view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match=rf"The draft's `future_channel.{name}` holds NaN or infinity"):
        generate(target, draft, confu_tree_size=4)
    assert_same(target, draft, contemplation=0)


def test_a_channel_too_large_for_the_targets_precision_is_refused():
    target = make_tiny_target(dtype=torch.float16)
    draft = make_tiny_draft(target, torch.float32)
    with torch.no_grad():
        draft.future_channel.soft_prompts[0, 0, 0, 0, 0] = 1e5
    with pytest.raises(
        ValueError, match=r"`future_channel.soft_prompts` holds 1e\+05, which is infinite in the target's"
    ):
        generate(target, draft, confu_tree_size=4)
    assert_same(make_tiny_target(dtype=torch.float32), draft)  # where it is a number like others


@torch.no_grad()
def test_contemplate_rows_that_overflow_inside_the_target_are_left_out():
    target = make_tiny_target()
    draft = make_tiny_draft(target)
    draft.future_channel.soft_prompts[:, 1] = 1.7e308  # as values; the projection behind them adds several
    statistics = assert_same(target, draft)
    assert statistics.contemplation_overflowed and statistics.contemplate_rows == 0
    draft.future_channel.soft_prompts[:, 1] = 1.0
    statistics = assert_same(target, draft)
    assert not statistics.contemplation_overflowed and statistics.contemplate_rows > 0


# Position tables

TABLES = {
    "GPT2": {},
    "GPTBigCode": {"num_key_value_heads": 1},
    "GPTJ": {"rotary_dim": 8},
    "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 32},
}


def with_table(name: str, **changes):
    changes = {"vocab_size": 13, "max_position_embeddings": 24, "pad_token_id": 0} | TABLES[name] | changes
    return make_family(name, **changes)


@pytest.mark.parametrize("name", TABLES)
def test_a_tree_ends_with_the_table_of_positions(name):
    """The text may end before the table does, for any reason; no guess may read beyond it."""
    target = with_table(name)
    draft = make_tiny_draft(target)
    room = 24 - PROMPT.shape[1] + 1  # the last token needs no position
    full = generate(target, max_new_tokens=room)
    for contemplation in (0, 8):
        knobs = {"confu_tree_size": 8, "confu_depth": 6, "confu_contemplation": contemplation}
        assert torch.equal(generate(target, draft, max_new_tokens=room, **knobs), full)
        for end in range(8, room):
            ends = {"max_new_tokens": 40, "eos_token_id": int(full[0, PROMPT.shape[1] + end])}
            assert torch.equal(generate(target, draft, **ends, **knobs), generate(target, **ends))


def test_beyond_the_table_the_error_is_plain_decodings():
    target = with_table("GPT2")
    for draft in (None, make_tiny_draft(target)):
        with pytest.raises(IndexError, match="index out of range in self"):
            generate(target, draft, max_new_tokens=40)


def test_a_chain_in_the_stock_loop_ends_with_the_table(monkeypatch):
    target = with_table("GPT2")
    draft = make_tiny_draft(target)
    monkeypatch.setattr(
        target, "_get_candidate_generator", lambda **kwargs: ConFuCandidateGenerator(draft, target), raising=False
    )
    room = 24 - PROMPT.shape[1] + 1
    full = generate(target, max_new_tokens=room)
    ends = {"max_new_tokens": 40, "eos_token_id": int(full[0, -1])}
    expected = generate(target, **ends)
    assert torch.equal(generate(target, **ends, prompt_lookup_num_tokens=1), expected)


# Randomness


def test_a_drafts_mode_changes_nothing():
    target = make_tiny_target()
    assert_same(target, make_tiny_draft(target).train())


@pytest.mark.parametrize(
    "make, found",
    [
        (lambda: make_tiny_target(attention_dropout=0.1), r"`attention_dropout=0.1`"),
        (
            lambda: with_table("GPT2", max_position_embeddings=64, resid_pdrop=0.2, attn_pdrop=0, embd_pdrop=0),
            r"`Dropout=0.2`",
        ),
    ],
)
def test_a_target_whose_text_is_random_is_refused(make, found):
    target = make()
    draft = make_tiny_draft(target)
    with pytest.raises(ValueError, match=rf"is in training mode with .*{found}.*call `target.eval\(\)` first"):
        generate(target.train(), draft)
    target.eval()
    target.get_decoder().train()  # a part of it is enough
    with pytest.raises(ValueError, match="is in training mode"):
        generate(target, draft)
    assert_same(target.eval(), draft)


def test_a_target_in_training_mode_without_randomness_is_served():
    target = make_tiny_target().train()
    assert_same(target, make_tiny_draft(target))


# Caches of the user's own


def test_a_cache_of_the_users_own_class():
    class NamedCache(DynamicCache):
        name = "mine"

    target = make_tiny_target()
    config = confu_generation_config(target, **GREEDY)
    ids = target.generate(
        PROMPT, assistant_model=make_tiny_draft(target), generation_config=config, cache=NamedCache()
    )
    assert torch.equal(ids, generate(target))


# Precision


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_autocast_may_differ_from_the_weights(dtype, autocast):
    target = make_tiny_target(dtype=dtype)
    draft = make_tiny_draft(target, torch.float16)
    with torch.autocast("cpu", autocast):
        plain = generate(target, max_new_tokens=1)
        ids = generate(target, draft, confu_tree_size=8)
    assert ids.shape[1] == PROMPT.shape[1] + 24
    assert torch.equal(ids[:, : plain.shape[1]], plain)  # later ones may differ by rounding


def test_layers_without_rope_beside_others_with_it():
    target = make_tiny_target()
    target.config.rope_parameters = {"full_attention": None, "sliding_attention": target.config.rope_parameters}
    assert_same(target, make_tiny_draft(target))
