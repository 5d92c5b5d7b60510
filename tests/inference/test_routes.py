"""Ways into `generate`: A `assistant_model`, B `custom_generate`, D the stock assisted loop; and what stays native."""

import copy
import itertools
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig, GenerationMixin, pipeline

from helpers import Recorder, make_tiny_draft, make_tiny_target, word_tokenizer
from transformers_confu import ConFuCandidateGenerator, ConFuGenerate, confu_generation_config
from transformers_confu.inference.generation_confu import install_dispatch


PROMPT = torch.tensor([[3, 4, 5, 2, 7]])
GREEDY = {"max_new_tokens": 24, "do_sample": False}


@pytest.fixture
def target():
    # So few tokens that a random draft is often right.
    return make_tiny_target(vocab_size=13)


@pytest.fixture
def draft(target):
    return make_tiny_draft(target)


# A


def test_a_pipeline_decodes_with_a_loaded_draft(target, draft):
    text, tokenizer = "t3 t4 t5 t2 t7", word_tokenizer()
    plain = pipeline("text-generation", model=target, tokenizer=tokenizer)(text, **GREEDY)
    assisted = pipeline("text-generation", model=target, tokenizer=tokenizer, assistant_model=draft)(text, **GREEDY)
    assert assisted == plain
    assert sum(draft.last_statistics.emitted) == 23


def test_the_knobs_of_call_target_and_draft(target, draft):
    """A knob of the call goes before one of the target, and that before one of the draft."""

    def largest_tree(**knobs) -> int:
        options = {"max_new_tokens": 12, "do_sample": False}
        if knobs:
            options = {"generation_config": confu_generation_config(target, **options, **knobs)}
        target.generate(PROMPT, assistant_model=draft, **options)
        return max(draft.last_statistics.tree_sizes)

    draft.generation_config.confu_depth = 3
    assert largest_tree() == 30
    draft.generation_config.confu_tree_size = 9
    assert largest_tree() == 9
    target.generation_config.confu_tree_size = 7
    assert largest_tree() == 7
    assert largest_tree(confu_tree_size=5) == 5


def test_beams_ignore_the_draft_as_they_ignore_any_assistant(target, draft):
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 2}
    assert torch.equal(target.generate(PROMPT, assistant_model=draft, **options), target.generate(PROMPT, **options))
    assert draft.last_statistics is None


# B


def test_custom_generate_streams(target, draft):
    plain, ours = Recorder(), Recorder()
    target.generate(PROMPT, streamer=plain, **GREEDY)
    target.generate(PROMPT, custom_generate=ConFuGenerate(draft, streamer=ours), **GREEDY)
    assert ours.events == plain.events and draft.last_statistics.tau > 1.1


def test_custom_generate_stops_at_strings(target, draft):
    tokenizer, plain = word_tokenizer(), target.generate(PROMPT, **GREEDY)[0].tolist()
    stop = [f"t{plain[PROMPT.shape[1] + 6]}", "t99"]
    expected = target.generate(PROMPT, stop_strings=stop, tokenizer=tokenizer, **GREEDY)
    assert PROMPT.shape[1] < expected.shape[1] < len(plain)
    generate = ConFuGenerate(draft, stop_strings=stop, tokenizer=tokenizer)
    assert torch.equal(target.generate(PROMPT, custom_generate=generate, **GREEDY), expected)


# D


def use_stock_loop(target, draft, depth: int = 4) -> None:
    """Let the assisted loop of Transformers ask a ConFu candidate generator."""
    target._get_candidate_generator = lambda **kwargs: ConFuCandidateGenerator(draft, target, depth=depth)


ASSISTED = {"prompt_lookup_num_tokens": 1}  # any option that selects the assisted loop


@pytest.fixture
def chains(monkeypatch):
    """Every chain or tree that is proposed: its tokens."""
    proposed = []
    propose = ConFuCandidateGenerator.propose

    def spy(self, *args, **kwargs):
        tree = propose(self, *args, **kwargs)
        proposed.append(tree.tokens[0].tolist())
        return tree

    monkeypatch.setattr(ConFuCandidateGenerator, "propose", spy)
    return proposed


def chain_config(target) -> GenerationConfig:
    """What makes the ConFu loop propose the chains of the stock loop."""
    return confu_generation_config(
        target, **GREEDY, confu_tree_size=5, confu_depth=4, confu_branching=1, confu_contemplation=0
    )


def assert_same_chains(chains: list[list[int]], expected: list[list[int]]) -> None:
    assert len(chains) == len(expected) > 3
    for chain, other in zip(chains, expected, strict=True):
        assert chain[: len(other)] == other  # near its end the ConFu loop proposes no more than there is room for


PADDED = {
    "input_ids": torch.tensor([[0, 0, 0, 3, 4, 5, 2, 7]]),
    "attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]]),
}


@pytest.mark.parametrize("narrow", [False, True], ids=["target's embeddings", "own embeddings"])
@pytest.mark.parametrize("inputs", [{"input_ids": PROMPT}, PADDED], ids=["plain", "left-padded"])
def test_the_stock_loop_writes_the_same_greedy_text(target, inputs, narrow, chains):
    """And it is offered the same chains as the ConFu loop in EAGLE-3 mode, so no row of the draft is misplaced."""
    draft = make_tiny_draft(target, **({"hidden_size": 16, "head_dim": 4} if narrow else {}))
    plain = target.generate(**inputs, **GREEDY)
    target.generate(**inputs, assistant_model=draft, generation_config=chain_config(target))
    expected, accepted = chains.copy(), draft.last_statistics.accepted
    assert sum(accepted) > 2
    chains.clear()
    use_stock_loop(target, draft)
    assert torch.equal(target.generate(**inputs, **ASSISTED, **GREEDY), plain)
    assert_same_chains(chains, expected)


def test_the_stock_loop_continues_a_cache(target, draft, chains):
    """By the new ids alone: given all of them, that loop computes the cached ones once more, with any assistant."""
    first = target.generate(PROMPT, return_dict_in_generate=True, **GREEDY)
    ids = torch.cat([first.sequences, torch.tensor([[5, 6]])], dim=1)
    plain = target.generate(ids, **GREEDY)
    cached = first.cache.get_seq_length()
    new = {"inputs": ids[:, cached:], "attention_mask": torch.ones_like(ids)}
    cache = copy.deepcopy(first.cache)
    target.generate(**new, cache=cache, assistant_model=draft, generation_config=chain_config(target))
    assert draft.last_statistics.draft_state == "restarted"  # it sees the new tokens only, as here
    expected = chains.copy()
    chains.clear()
    use_stock_loop(target, draft)
    continued = target.generate(**new, cache=first.cache, **ASSISTED, **GREEDY)
    assert torch.equal(continued, plain[:, cached:])
    assert_same_chains(chains, expected)


def test_the_stock_loop_samples_by_the_same_law():
    """Frequencies of all texts of three tokens against their probabilities under the target, by chi-square."""
    vocab_size, length, draws = 3, 3, 500
    target = make_tiny_target(vocab_size=vocab_size, num_hidden_layers=1, bos_token_id=None, initializer_range=0.15)
    draft = make_tiny_draft(target, target_hidden_state_indices=[1])
    prompt = torch.tensor([[1, 2, 0]])
    texts = list(itertools.product(range(vocab_size), repeat=length))
    with torch.no_grad():
        ids = torch.cat([prompt.expand(len(texts), -1), torch.tensor(texts)], dim=1)
        log_probs = target(ids).logits[:, prompt.shape[1] - 1 : -1].log_softmax(-1)
    probabilities = log_probs.gather(2, torch.tensor(texts)[..., None]).sum(1)[:, 0].exp()
    assert probabilities.sum().item() == pytest.approx(1) and probabilities.min() * draws > 2

    use_stock_loop(target, draft, depth=2)
    torch.manual_seed(0)
    counts = dict.fromkeys(texts, 0)
    for _ in range(draws):
        drawn = target.generate(prompt, do_sample=True, top_k=0, max_new_tokens=length, **ASSISTED)
        counts[tuple(drawn[0, prompt.shape[1] :].tolist())] += 1
    expected = (probabilities * draws).tolist()
    chi_square = sum((counts[text] - mean) ** 2 / mean for text, mean in zip(texts, expected, strict=True))
    assert chi_square < 58  # 26 degrees of freedom: a true sampler exceeds it once in 3,000 seeds


# The dispatch


def test_every_draft_runs_its_own_engine(target):
    class Assistant:
        def confu_decode(self, *args, **kwargs):
            return args, kwargs

    assistant = Assistant()
    args, kwargs = GenerationMixin._assisted_decoding(target, PROMPT, assistant_model=assistant, streamer=None)
    assert args == (target, PROMPT) and kwargs == {"assistant_model": assistant, "streamer": None}


def test_an_attribute_of_an_instance_does_not_dispatch(target):
    """Mocks and lazily built objects answer to every name; only a class that defines the method is a draft."""
    assistant = SimpleNamespace(confu_decode=lambda *args, **kwargs: "dispatched")
    with pytest.raises(RuntimeError, match="requires a cache"):  # the first thing that the native method looks for
        GenerationMixin._assisted_decoding(target, PROMPT, None, None, None, assistant_model=assistant)


def test_a_draft_is_compiled_in_place(target, draft):
    with pytest.raises(TypeError, match=r"compiled by `draft\.compile\(\)`"):
        target.generate(PROMPT, assistant_model=torch.compile(draft, backend="eager"), **GREEDY)
    plain = target.generate(PROMPT, **GREEDY)
    draft.compile(backend="eager")
    assert torch.equal(target.generate(PROMPT, assistant_model=draft, **GREEDY), plain)
    assert draft.last_statistics.rounds > 0


def test_an_unknown_signature_is_left_alone_and_the_draft_says_so(target, draft, monkeypatch):
    native = GenerationMixin._assisted_decoding.__wrapped__

    def changed(self, input_ids, new_parameter=None, **arguments):
        return native(self, input_ids, **arguments)

    monkeypatch.setattr(GenerationMixin, "_assisted_decoding", changed)
    assert not install_dispatch()
    assert GenerationMixin._assisted_decoding is changed
    with pytest.raises(TypeError, match="has a decoding loop that the installed ConFu does not know"):
        target.generate(PROMPT, assistant_model=draft, **GREEDY)
    # The way that the sentence names works.
    plain = target.generate(PROMPT, **GREEDY)
    assert torch.equal(target.generate(PROMPT, custom_generate=ConFuGenerate(draft), **GREEDY), plain)


NATIVE = """
import json, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
{setup}
torch.manual_seed(0)
sizes = dict(vocab_size=13, hidden_size=32, intermediate_size=64, num_attention_heads=4, initializer_range=0.3)
target, assistant = [
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, eos_token_id=None, **sizes)).double().eval()
    for layers in (3, 1)
]
results = []
for options in ({{}}, {{"num_beams": 3}}, {{"prompt_lookup_num_tokens": 3}}, {{"assistant_model": assistant}}):
    for do_sample in (False, True):
        torch.manual_seed(0)
        prompt = torch.tensor([[3, 4, 5, 2, 7, 3, 4, 5]])
        ids = target.generate(prompt, max_new_tokens=20, do_sample=do_sample, **options)
        results.append((ids.tolist(), torch.get_rng_state().sum().item()))
print(json.dumps(results))
"""
RELOADED = """
import importlib
from transformers import GenerationMixin
import transformers_confu.inference.generation_confu
installed = GenerationMixin._assisted_decoding
importlib.reload(transformers_confu.inference.generation_confu)
assert GenerationMixin._assisted_decoding is installed and not hasattr(installed.__wrapped__, "dispatches_confu")
"""


def test_after_import_native_decoding_is_what_it_was():
    outputs = []
    for setup in ("assert not any('confu' in module for module in sys.modules)", RELOADED):
        result = subprocess.run([sys.executable, "-c", NATIVE.format(setup=setup)], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        outputs.append(json.loads(result.stdout.splitlines()[-1]))
    without, within = outputs
    assert within == without
    assert without[0] == without[4] == without[6]  # plain, prompt lookup and assistant: these are right at all
