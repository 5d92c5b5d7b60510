"""The proof of a target: what it must refuse, what it must let pass, and that nobody notices it."""

import functools

import pytest
import torch
from transformers import LlamaForCausalLM

from helpers import make_family, make_tiny_draft, make_tiny_target
from transformers_confu import confu_generation_config
from transformers_confu.inference.self_check import prove_target


PROMPT = torch.tensor([[3, 14, 15, 92, 65]])


def generate(target, draft=None, **options):
    config = confu_generation_config(target, **{"max_new_tokens": 16, "do_sample": False} | options)
    return target.generate(PROMPT, assistant_model=draft, generation_config=config)


def with_forward(change):
    """A Llama whose inputs are changed before they reach its own `forward`."""
    target = make_tiny_target()
    own = target.forward
    target.forward = functools.wraps(own)(lambda *args, **kwargs: own(*args, **change(kwargs)))
    return target


def rows_in_order(inputs):
    """Causal by the order of rows, whatever mask there is."""
    mask = inputs.get("attention_mask")
    return inputs | {"attention_mask": None if mask is not None and mask.ndim == 4 else mask}


def rows_counted(inputs):
    """Positions by the order of rows."""
    return inputs | {"position_ids": None}


def steered():
    """An activation added to the last row of every forward."""
    target = make_tiny_target()
    direction = torch.linspace(-1, 1, 32, dtype=torch.float64)

    def steer(module, args, output):
        changed = output.clone()
        changed[:, -1] += direction
        return changed

    target.model.layers[2].mlp.register_forward_hook(steer)
    return target


class PreparesItself(LlamaForCausalLM):
    """What a subclass may do in the method by which plain decoding prepares every forward."""

    def prepare_inputs_for_generation(self, *args, **kwargs):
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        return inputs | {"position_ids": 2 * inputs["position_ids"]}


def prepares_itself():
    target = make_tiny_target()
    target.__class__ = PreparesItself
    return target


def alibi_unnamed():
    target = make_family("Falcon", alibi=True)
    target.config.alibi = False
    return target


def looped_unnamed(mode: str):
    """As many layers as are cached, with loops that its configuration keeps to itself."""
    layers = {"n_input_layers": 2, "n_recurrent_layers": 2, "n_output_layers": 2, "num_hidden_layers": 6}
    layers |= {"layer_types": ["full_attention"] * 6, "n_recurrent_loops": 2, "recurrent_kv_cache_mode": mode}
    target = make_family("Dory", **layers)
    # The model keeps a reference to it, so a copy is what the checks read.
    target.model.config = target.config
    target.config = type(target.config).from_dict(target.config.to_dict() | {"n_recurrent_loops": 1})
    target.config._attn_implementation = "sdpa"
    return target


def llama4_unnamed():
    layers = {"layer_types": ["full_attention"] * 5, "no_rope_layers": [1, 0, 1, 1, 0], "moe_layers": []}
    scaled = {"attn_temperature_tuning": True, "floor_scale": 4}
    target = make_family("Llama4Text", **layers, **scaled, intermediate_size_mlp=64, pad_token_id=0)
    target.config.attn_temperature_tuning = False
    return target


OTHERWISE = "otherwise than the same texts token by token"
WRONG = {
    "mask ignored": (functools.partial(with_forward, rows_in_order), OTHERWISE),
    "positions ignored": (functools.partial(with_forward, rows_counted), OTHERWISE),
    "hook on the last row": (steered, OTHERWISE),
    "own preparation of inputs": (prepares_itself, OTHERWISE),
    "queries scaled by row": (llama4_unnamed, OTHERWISE),
    "ALiBi without its flag": (alibi_unnamed, "FalconForCausalLM cannot compute a tree"),
    "loops with caches of their own": (
        functools.partial(looped_unnamed, "per_loop"),
        "has 6 layers that cache, but caches keys and values of 8",
    ),
    "loops over one cache": (functools.partial(looped_unnamed, "last_loop"), OTHERWISE),
}


@pytest.mark.parametrize("contemplation", [0, 8])
@pytest.mark.parametrize("make, sentence", WRONG.values(), ids=WRONG.keys())
def test_a_target_whose_rows_depend_on_more_than_mask_and_positions_is_refused(make, sentence, contemplation):
    target = make()
    draft = make_tiny_draft(target)
    with pytest.raises(ValueError) as error:
        generate(target, draft, confu_tree_size=8, confu_contemplation=contemplation)
    # Contemplate rows may make such a target fail outright.
    assert sentence in str(error.value) or (contemplation and "cannot compute a tree" in str(error.value))


def test_a_patched_target_that_follows_mask_and_positions_passes():
    target = make_tiny_target()
    draft, plain, own = make_tiny_draft(target), generate(target), target.forward
    target.forward = lambda *args, **kwargs: own(*args, **kwargs)  # says nothing of what it takes
    assert torch.equal(generate(target), plain)
    assert torch.equal(generate(target, draft), plain)
    assert draft.last_statistics.rounds > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_reason_to_refuse(dtype):
    for seed in range(8):
        target = make_tiny_target("qwen3", dtype, seed=seed)
        assert prove_target(target, make_tiny_draft(target), contemplates=True)


def test_a_pair_is_proved_once_and_again_when_the_target_is_changed():
    target = make_tiny_target()
    drafts = [make_tiny_draft(target), make_tiny_draft(target, seed=2)]

    def self_checked(draft, **options):
        generate(target, draft, **options)
        return draft.last_statistics.self_checked

    fixed = {"confu_tree_size": 4}
    assert [self_checked(draft, **fixed) for draft in (*drafts, *drafts)] == [True, True, False, False]
    assert [self_checked(drafts[0], **fixed, confu_contemplation=0) for _ in range(2)] == [True, False]
    handle = target.model.layers[0].register_forward_hook(lambda *_: None)
    assert [self_checked(drafts[0], **fixed) for _ in range(2)] == [True, False]
    handle.remove()


def test_it_draws_no_random_number_and_leaves_no_trace():
    target = make_tiny_target()
    draft = make_tiny_draft(target)
    state, weights = torch.get_rng_state(), {name: p.clone() for name, p in target.state_dict().items()}
    assert prove_target(target, draft, contemplates=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, weights[name]) for name, p in target.state_dict().items())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize")
def test_quantised_activations_are_warned_of_once():
    target = make_tiny_target(dtype=torch.float32)
    draft = make_tiny_draft(target)
    quantised = torch.ao.quantization.quantize_dynamic(target, {torch.nn.Linear})
    with pytest.warns(
        UserWarning, match=r"has quantised activations \(torch Linear\), whose scales depend on all rows"
    ):
        generate(quantised, draft, confu_tree_size=4)
    generate(quantised, draft, confu_tree_size=4)
    assert not draft.last_statistics.self_checked
