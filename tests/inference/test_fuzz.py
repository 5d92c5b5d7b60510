"""Random calls, each beside plain `generate`: whatever options meet, the same text, random state, scores and cache.

Nothing here is shared with `exactness.py`, so that a fault of that harness cannot hide one of the engine. A failure
names its seed; `pytest tests/inference/test_fuzz.py --fuzz-seeds 5000` (`make fuzz`) tries more, and with
`--fuzz-first 1234 --fuzz-seeds 1` one alone.
"""

import copy
import functools
import random
import threading
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)

from exactness import truly_fp64
from helpers import Recorder, cached_tensors, make_family, make_tiny_draft, word_tokenizer
from transformers_confu import ConFuGenerate
from transformers_confu.inference.target import TargetRunner


ROOM = 120  # tokens that a static cache may hold
VOCABULARY = 13  # so small that a random draft is often right
SIZES = {"vocab_size": VOCABULARY, "intermediate_size": 48, "num_hidden_layers": 3, "initializer_range": 0.4}
SIZES |= {"pad_token_id": 0}
WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
DELTA_NET = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
DELTA_NET |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_d_ssm": 64, "mamba_chunk_size": 4}
PER_LAYER = {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 1}
PER_LAYER |= {"sliding_window": 6}
GEMMA3N = PER_LAYER | {"layer_types": WINDOWS, "laurel_rank": 4, "altup_num_inputs": 2}
FAMILIES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Mistral": {"sliding_window": None},
    "Gemma": {},
    "Olmo2": {},
    "Qwen3, windows": {"layer_types": WINDOWS, "sliding_window": 5, "use_sliding_window": True},
    "Gemma3Text": {"layer_types": WINDOWS, "sliding_window": 9, "query_pre_attn_scalar": 8},
    "Mistral, windows": {"sliding_window": 4},
    "Qwen3_5Text": DELTA_NET | {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "Lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "FalconH1": MAMBA,
    "Gemma3nText": GEMMA3N | {"activation_sparsity_pattern": [0.5, 0.0, 0.0]},
    "Gemma4Text": PER_LAYER | {"layer_types": [*WINDOWS[:2], "full_attention"], "per_layer_config": {}},
    "GPTNeoX": {},
    "GPT2": {},
}


@functools.cache
def pair(family: str, kind: int):
    """A target and a draft of three kinds: with a window, with rotated soft prompts, for a part of the vocabulary."""
    attention = "eager" if kind == 2 else "sdpa"
    changes = SIZES | FAMILIES[family]
    target = make_family(family.split(",")[0], attn_implementation=attention, seed=kind, **changes)
    kinds = {0: {"attention_window": 7}, 1: {"rotate_soft_prompts": family != "GPT2"}, 2: {"draft_vocab_size": 10}}
    options: dict[str, Any] = kinds[kind]
    return target, make_tiny_draft(target, target_hidden_state_indices=[1, 2], **options)


# What a caller may bring along


class FavoursByPrefix(LogitsProcessor):
    """Favours a token that depends on the whole prefix."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, int((input_ids * torch.arange(1, input_ids.shape[1] + 1)).sum()) % VOCABULARY] += 2.0
        return scores


class StopsAtSum(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((1,), bool(input_ids.sum() % 17 == 0))


class Interrupted(Exception):
    pass


class Interrupts(StoppingCriteria):
    """Raises when it is asked for the n-th time."""

    def __init__(self, calls: int):
        self.calls = calls

    def __call__(self, input_ids, scores, **kwargs):
        self.calls -= 1
        if self.calls < 0:
            raise Interrupted
        return torch.zeros(1, dtype=torch.bool)


# One case


@dataclass
class Case:
    """A conversation of one to three calls, with options of `generate` that hold for all of them."""

    seed: int
    rng: random.Random = field(init=False)

    def __post_init__(self):
        rng = self.rng = random.Random(self.seed)
        family = rng.choice(list(FAMILIES))
        self.target, self.draft = pair(family, rng.randrange(3))
        self.options = self._options()
        self.knobs = {
            "confu_tree_size": rng.choice([1, 2, 5, 12, 30]),
            "confu_depth": rng.randint(1, 8),
            "confu_branching": rng.randint(1, 10),
            "confu_contemplation": rng.choice([0, 1, 3, 30]),
            "confu_lookup": rng.random() < 0.5,
        }
        self.chat = rng.random() < 0.4
        self.turns = rng.randint(2, 3) if self.chat else 1
        self.embeds = not self.chat and rng.random() < 0.2
        self.padding = rng.randint(1, 4) if rng.random() < 0.25 else 0
        self.own_cache = rng.random() < 0.3
        self.interrupt_after = rng.randint(0, 6) if rng.random() < 0.2 else None
        self.records = self.chat or rng.random() < 0.5
        self.streams = rng.random() < 0.3
        self.route_b = rng.random() < 0.25
        self.new_ids_only = rng.random() < 0.5
        self.processors, self.criteria = rng.random() < 0.2, rng.random() < 0.2
        self.stop_strings = f"t{rng.randrange(12)}" if rng.random() < 0.15 else None
        kinds = set(getattr(self.target.config, "layer_types", None) or [])
        is_full = kinds <= {"full_attention"} and FAMILIES[family].get("sliding_window") is None
        # Rows of padding see nothing and so average what there is: over a static cache also rows that are still empty.
        self.static_cache = is_full and not self.padding and rng.random() < 0.3

    def _options(self) -> dict[str, Any]:
        rng = self.rng
        tokens = functools.partial(rng.sample, range(2, VOCABULARY))
        options: dict[str, Any] = {"max_new_tokens": rng.randint(1, 20), "do_sample": rng.random() < 0.5}
        if options["do_sample"]:
            options |= rng.choice([{"top_k": 0}, {"top_k": 4}, {"top_k": 0, "top_p": 0.7}, {"min_p": 0.1}])
            options |= rng.choice([{}, {"temperature": 0.6}, {"temperature": 1.7}, {"typical_p": 0.8}])
        possible = {
            "eos_token_id": tokens(rng.randint(1, 3)),
            "repetition_penalty": rng.choice([0.8, 1.3]),
            "no_repeat_ngram_size": rng.randint(1, 3),
            "min_new_tokens": rng.randint(1, 6),
            "bad_words_ids": [tokens(1), tokens(2)],
            "suppress_tokens": tokens(3),
            "begin_suppress_tokens": tokens(2),
            "sequence_bias": [[tokens(1), -5.0], [tokens(2), 3.0]],
            "forced_eos_token_id": rng.randrange(2, VOCABULARY),
            "renormalize_logits": True,
            "prefill_chunk_size": rng.randint(1, 7),
        }
        return options | {name: value for name, value in possible.items() if rng.random() < 0.18}

    def prompts(self) -> list[torch.LongTensor]:
        """The new tokens of each turn."""
        rng = random.Random(self.seed + 1)
        return [
            torch.tensor([[rng.randrange(2, VOCABULARY) for _ in range(rng.randint(1, 9))]]) for _ in range(self.turns)
        ]

    def run(self, assisted: bool) -> list[dict[str, Any]]:
        """What each turn gives, by plain `generate` or with the draft."""
        torch.manual_seed(self.seed)
        cache: Cache | None = DynamicCache(config=self.target.config) if self.own_cache else None
        if self.static_cache and self.own_cache:
            cache = StaticCache(config=self.target.config, max_cache_len=ROOM)
        text = torch.zeros(1, 0, dtype=torch.long)
        results = []
        for prompt in self.prompts():
            if not results and self.padding:
                prompt = torch.cat([torch.zeros(1, self.padding, dtype=torch.long), prompt], dim=1)
            text = torch.cat([text, prompt], dim=1)
            mask = torch.ones_like(text)
            mask[:, : self.padding] = 0
            result = self._call(assisted, text, prompt, mask, cache, interrupt=not results)
            results.append(result)
            new = result["sequences"]
            if self.embeds:
                break
            starts = text.shape[1] if new.shape[1] >= text.shape[1] else prompt.shape[1]
            text = torch.cat([text, new[:, starts:]], dim=1)
            cache = result.get("cache", cache)
        return results

    def _call(self, assisted, text, prompt, mask, cache, interrupt) -> dict[str, Any]:
        options: dict[str, Any] = dict(self.options)
        if self.records:
            options |= {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True}
        if self.static_cache and cache is None:
            options |= {"cache_implementation": "static", "max_cache_len": ROOM}
        call: dict[str, Any] = {"attention_mask": mask, "cache": cache}
        if self.embeds:
            call["inputs_embeds"] = self.target.get_input_embeddings()(text).detach()
        else:
            cached = 0 if cache is None else int(cache.get_seq_length())
            call["input_ids"] = text[:, cached:] if self.new_ids_only else text
        if self.processors:
            call["logits_processor"] = LogitsProcessorList([FavoursByPrefix()])
        criteria = [StopsAtSum()] if self.criteria else []
        streamer = Recorder() if self.streams else None

        strings = {"stop_strings": self.stop_strings, "tokenizer": word_tokenizer()} if self.stop_strings else {}

        def generate(extra: list[StoppingCriteria]):
            arguments = dict(call, stopping_criteria=StoppingCriteriaList([*criteria, *extra]))
            arguments["generation_config"] = config(options | (self.knobs if assisted else {}))
            if assisted and self.route_b:
                method = ConFuGenerate(self.draft, streamer=streamer, **strings)
                return self.target.generate(**arguments, custom_generate=method)
            arguments |= {"assistant_model": self.draft} if assisted else {}
            return self.target.generate(**arguments, **strings, streamer=streamer)

        if assisted and interrupt and self.interrupt_after is not None and not self.streams:
            state, length = torch.get_rng_state(), 0 if cache is None else int(cache.get_seq_length())
            before = copy.deepcopy(cache)
            try:
                generate([Interrupts(self.interrupt_after)])
            except Interrupted:
                assert cache is None or cache.get_seq_length() == length, "an interrupted call leaves rows behind"
            if cache is not None and cache.get_seq_length() != length:  # it ended before it was interrupted
                call["cache"] = before
            torch.set_rng_state(state)
        output = generate([])
        result = {"sequences": output if isinstance(output, torch.Tensor) else output.sequences}
        if not isinstance(output, torch.Tensor):
            result |= {"scores": output.scores, "hidden_states": output.hidden_states, "cache": output.cache}
        result["random state"] = torch.get_rng_state()
        if streamer is not None:
            result["streamed"] = streamer.events
        return result


def config(options: dict[str, Any]) -> GenerationConfig:
    made = GenerationConfig(**options)
    made._from_model_config = False
    return made


def difference(expected: Any, actual: Any, tolerance: float) -> str | None:
    """Where two nested results differ, or `None`."""
    if isinstance(expected, torch.Tensor):
        if expected.shape != actual.shape:
            return f"shapes {tuple(expected.shape)} and {tuple(actual.shape)}"
        if not expected.is_floating_point():
            return None if torch.equal(expected, actual) else f"{expected.tolist()[:40]} is not {actual.tolist()[:40]}"
        close = torch.isclose(expected, actual, rtol=tolerance, atol=tolerance * 10, equal_nan=True) | (
            expected == actual
        )
        return None if bool(close.all()) else f"off by {(expected - actual).abs().nan_to_num(0, 0).max():.1e}"
    if isinstance(expected, Cache):
        return difference(cached_tensors(expected), cached_tensors(actual), tolerance)
    if isinstance(expected, (tuple, list)) and expected and isinstance(expected[0], (torch.Tensor, tuple)):
        if len(expected) != len(actual):
            return f"lengths {len(expected)} and {len(actual)}"
        found = (difference(one, other, tolerance) for one, other in zip(expected, actual, strict=True))
        return next((text for text in found if text is not None), None)
    return None if expected == actual else f"{expected} is not {actual}"


def check(seed: int) -> bool:
    """Compare one case; whether plain decoding could do it at all."""
    case = Case(seed)
    try:
        plain = case.run(assisted=False)
    except (RuntimeError, ValueError, IndexError):  # options that contradict each other
        return False
    for turn, (expected, actual) in enumerate(zip(plain, case.run(assisted=True), strict=True)):
        assert expected.keys() == actual.keys()
        for name, value in expected.items():
            found = difference(value, actual[name], tolerance=1e-5)
            assert found is None, f"turn {turn}, {name}: {found}"
    return True


def check_threads(seed: int) -> bool:
    """Four greedy calls at once that share target and draft."""
    target, draft = pair("Llama", seed % 3)
    prompts = [torch.randint(2, VOCABULARY, (1, 4 + n), generator=torch.Generator().manual_seed(n)) for n in range(4)]
    options = {"max_new_tokens": 16, "do_sample": False}
    expected = [target.generate(prompt, **options) for prompt in prompts]
    actual: list[Any] = [None] * 4

    def work(number: int) -> None:
        own = config(options | {"confu_tree_size": 10, "confu_contemplation": 3 * (number % 2)})
        actual[number] = target.generate(prompts[number], assistant_model=draft, generation_config=own)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, other) for one, other in zip(expected, actual, strict=True))
    return True


def run_seeds(seeds: range) -> None:
    done = 0
    for seed in seeds:
        try:
            # Softmax in fp32 makes NaN of a row that sees nothing, as padding longer than a window does.
            with truly_fp64():
                done += check_threads(seed) if seed % 50 == 49 else check(seed)
        except Exception as error:
            error.add_note(f"seed {seed}: pytest tests/inference/test_fuzz.py --fuzz-first {seed} --fuzz-seeds 1")
            raise
    assert len(seeds) < 100 or done > 0.85 * len(seeds), f"only {done} of {len(seeds)} cases could be compared"


@pytest.mark.filterwarnings("ignore")
def test_random_calls_are_plain_generates(request):
    first, count = (request.config.getoption(name) for name in ("--fuzz-first", "--fuzz-seeds"))
    run_seeds(range(first, first + count))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fault", ["rows of others", "one row too many"])
def test_a_faulty_compaction_is_found(monkeypatch, fault):
    own = TargetRunner.compact

    def compact(runner, cache, prefix_length, path):
        if fault == "rows of others":
            path = list(range(len(path)))
        own(runner, cache, prefix_length, path)
        if fault == "one row too many":
            layer = cache.layers[0]
            layer.keys = layer.keys.clone()
            layer.keys[..., -1, :] = layer.keys[..., 0, :]

    monkeypatch.setattr(TargetRunner, "compact", compact)
    with pytest.raises(Exception, match=r"turn \d, "):
        run_seeds(range(40))
