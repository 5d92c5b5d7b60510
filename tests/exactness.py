"""Is assisted decoding the same as plain `generate`? The comparison, what it accepts, and the cases it is run on.

fp64: ids identical; hidden states behind each token within 1e-12, relative to the largest; generator state after a
call identical. Transformers rounds logits to fp32 before they are processed, so scores agree to that rounding. It also
computes norms and eager softmax in fp32, where a difference of 1e-15 can flip a rounding: run under [`truly_fp64`].

fp32: ids identical except at a proven tie: at the first token that differs, plain `generate` itself had the two
candidates within 1e-4 of each other, and in fp64 the same case is identical.
"""

import copy
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from transformers import PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from transformers_confu import ConFuCandidateGenerator, ConFuDraftModel, confu_generation_config
from transformers_confu.inference.call_statistics import ConFuStatistics
from transformers_confu.inference.draft_tree import DraftTree
from transformers_confu.inference.rounds import FixedRounds
from transformers_confu.inference.target import TargetRunner


TIE = 1e-4
FP64_ROUNDING, FP32_ROUNDING = 1e-12, 1e-6


# --- drafts


def always_wrong(draft: ConFuDraftModel, text: torch.LongTensor) -> ConFuDraftModel:
    """A copy of `draft` whose vocabulary has none of the tokens of `text`: nothing it proposes is ever accepted."""
    others = sorted(set(range(draft.config.vocab_size)) - set(text.flatten().tolist()))
    draft = copy.deepcopy(draft)
    draft.set_draft_vocabulary(torch.tensor(others[: draft.config.draft_vocab_size]))
    return draft


@dataclass
class Oracle:
    r"""
    Trees that hold the true text among wrong siblings, at random places of random shapes.

    An untrained draft is rarely right, so it hardly tests what happens when it is: long acceptances, paths through
    later siblings, and moving their cache rows.

    Args:
        text (`list[int]`): The whole text, prompt included, as plain decoding writes it.
        max_length (`int`): Of the call, from which the oracle knows where in the text a round stands.
        seed (`int`): Of the shapes.
    """

    text: list[int]
    max_length: int
    seed: int = 0
    trees: list[DraftTree] = field(default_factory=list)
    """What it proposed, round by round."""
    paths: list[list[int]] = field(default_factory=list)
    """Which nodes each round accepted."""

    @contextmanager
    def proposing(self) -> Iterator["Oracle"]:
        """Within it every `ConFuCandidateGenerator` proposes the oracle's trees; its own are made and thrown away."""
        rng = random.Random(self.seed)
        own_propose, own_compact = ConFuCandidateGenerator.propose, TargetRunner.compact

        def propose(generator, root_tokens, rounds, max_depth, future_states, noise):
            own = own_propose(generator, root_tokens, rounds, max_depth, future_states, noise)
            written = self.max_length - max_depth - 1
            assert own.tokens[0, 0] == self.text[written - 1]
            if isinstance(rounds, FixedRounds):
                tree_size, depth = rounds.knobs.tree_size, min(rounds.knobs.depth, max_depth)
            else:
                tree_size, depth = rng.randint(1, 24), min(rounds.MAX_DEPTH, max_depth)
            continuation = self.text[written : written + depth]
            vocab_size = generator.draft.config.vocab_size
            self.trees.append(oracle_tree(self.text[written - 1], continuation, tree_size, depth, vocab_size, rng))
            return self.trees[-1]

        def compact(runner, cache, prefix_length, path):
            self.paths.append(path)
            own_compact(runner, cache, prefix_length, path)

        with (
            mock.patch.object(ConFuCandidateGenerator, "propose", propose),
            mock.patch.object(TargetRunner, "compact", compact),
        ):
            yield self


def oracle_tree(
    root: int, continuation: list[int], tree_size: int, max_depth: int, vocab_size: int, rng: random.Random
) -> DraftTree:
    """A random tree of at most `tree_size` nodes, with `continuation` as one of its paths as far as it has room."""
    tokens, parents, log_probs, depths = [root], [0], [0.0], [0]
    children: set[tuple[int, int]] = set()
    true_path = [0]  # nodes of the continuation so far

    def add(parent: int, token: int) -> None:
        children.add((parent, token))
        tokens.append(token)
        parents.append(parent)
        depths.append(depths[parent] + 1)
        log_probs.append(log_probs[parent] - rng.expovariate(1.0))

    for _ in range(4 * tree_size):
        if len(tokens) >= tree_size:
            break
        if len(true_path) <= len(continuation) and rng.random() < 0.4:
            add(true_path[-1], continuation[len(true_path) - 1])
            true_path.append(len(tokens) - 1)
            continue
        parent, token = rng.randrange(len(tokens)), rng.randrange(vocab_size)
        is_true = parent in true_path and continuation[depths[parent] : depths[parent] + 1] == [token]
        if depths[parent] < max_depth and (parent, token) not in children and not is_true:
            add(parent, token)
    return DraftTree.from_parents(torch.tensor([tokens]), torch.tensor([parents]), torch.tensor([log_probs]))


# --- the comparison


@contextmanager
def truly_fp64() -> Iterator[None]:
    """Within it, what Transformers computes in fp32 inside an fp64 Llama or Qwen3 is computed in fp64."""
    softmax = torch.nn.functional.softmax

    def wide_softmax(input, dim=None, dtype=None, **kwargs):
        return softmax(input, dim=dim, dtype=None if input.dtype == torch.float64 else dtype, **kwargs)

    def wide_norm(self, hidden_states):
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * hidden_states * torch.rsqrt(variance + self.variance_epsilon)

    with (
        mock.patch.object(torch.nn.functional, "softmax", wide_softmax),
        mock.patch.object(LlamaRMSNorm, "forward", wide_norm),
        mock.patch.object(Qwen3RMSNorm, "forward", wide_norm),
    ):
        yield


@dataclass
class Tie:
    """A difference in fp32 that is proven to be one of rounding."""

    case: str
    index: int
    gap: float

    def __str__(self) -> str:
        return f"{self.case}: token {self.index}, candidates {self.gap:.1e} apart, identical in fp64"


@dataclass
class Comparison:
    """One case decoded twice."""

    plain: GenerateDecoderOnlyOutput
    assisted: GenerateDecoderOnlyOutput | torch.LongTensor
    plain_state: torch.Tensor
    assisted_state: torch.Tensor
    statistics: ConFuStatistics
    prompt_length: int
    options: dict[str, Any]
    seed: int
    oracle: Oracle | None

    @property
    def assisted_ids(self) -> torch.LongTensor:
        return self.assisted if isinstance(self.assisted, torch.Tensor) else self.assisted.sequences

    def first_difference(self) -> int | None:
        """Index into the generated tokens, `None` if the texts are the same."""
        plain = self.plain.sequences[0, self.prompt_length :].tolist()
        assisted = self.assisted_ids[0, self.prompt_length :].tolist()
        if plain == assisted:
            return None
        pairs = zip(plain, assisted, strict=False)
        return next((i for i, (p, a) in enumerate(pairs) if p != a), min(len(plain), len(assisted)))

    def gap(self, index: int) -> float:
        r"""
        How much plain decoding preferred its token `index` to the assisted one, in units of the scores.

        A draw takes the token with the largest score + Gumbel noise, as `torch.multinomial` does with
        exponential noise, so the same noise is drawn again here.
        """
        plain, assisted = (ids[0, self.prompt_length + index] for ids in (self.plain.sequences, self.assisted_ids))
        preference = self.plain.scores[index][0]
        if self.options.get("do_sample"):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                for scores in self.plain.scores[: index + 1]:
                    state = torch.get_rng_state()
                    drawn = torch.multinomial(scores.softmax(dim=-1), num_samples=1)[0, 0]
                torch.set_rng_state(state)
                noise = torch.empty_like(scores).exponential_()[0]
            preference = preference.log_softmax(dim=-1) - noise.log()
            assert drawn == plain == preference.argmax(), "multinomial draws in another way than this proof assumes"
        return (preference[plain] - preference[assisted]).item()


def compare(
    target: PreTrainedModel,
    draft: ConFuDraftModel,
    input_ids: torch.LongTensor | None,
    options: dict[str, Any],
    knobs: dict[str, int] | None = None,
    seed: int = 0,
    record: bool = True,
    oracle: bool = False,
    call: Callable[[], dict[str, Any]] = dict,
    plain: tuple[GenerateDecoderOnlyOutput, torch.Tensor] | None = None,
) -> Comparison:
    r"""
    Decode once by plain `generate` and once with a draft.

    Args:
        options: Entries of the generation config, for both.
        knobs: ConFu's, for the assisted call; without the prefix `confu_`.
        seed: Set before each of the two calls.
        record: Whether the assisted call returns scores and hidden states too.
        oracle: Let an [`Oracle`] propose instead of the draft; needs `max_new_tokens` in `options`.
        call: Makes further arguments of `generate`, anew for each call since some keep a state.
        plain: What [`decode_plainly`] gave for the same case, to save time.
    """
    plain_output, plain_state = plain or decode_plainly(target, input_ids, options, seed, call)
    recorded = {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True}
    config = confu_generation_config(
        target,
        **options,
        **(recorded if record else {}),
        **{f"confu_{name}": value for name, value in (knobs or {}).items()},
    )
    guide = None
    prompt_length = 0 if input_ids is None else input_ids.shape[1]
    torch.manual_seed(seed)
    arguments = {"assistant_model": draft, "generation_config": config} | call()
    if oracle:
        max_length = prompt_length + options["max_new_tokens"]
        with Oracle(plain_output.sequences[0].tolist(), max_length, seed).proposing() as guide:
            assisted = target.generate(input_ids, **arguments)
    else:
        assisted = target.generate(input_ids, **arguments)
    return Comparison(
        plain_output,
        assisted,
        plain_state,
        torch.get_rng_state(),
        draft.last_statistics,
        prompt_length,
        options,
        seed,
        guide,
    )


def decode_plainly(
    target: PreTrainedModel,
    input_ids: torch.LongTensor | None,
    options: dict[str, Any],
    seed: int = 0,
    call: Callable[[], dict[str, Any]] = dict,
) -> tuple[GenerateDecoderOnlyOutput, torch.Tensor]:
    """Plain `generate` with everything recorded, and the generator state after it."""
    torch.manual_seed(seed)
    recorded = {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True}
    output = target.generate(input_ids, **recorded, **options, **call())
    return output, torch.get_rng_state()


def assert_identical(comparison: Comparison) -> None:
    """The fp64 promise."""
    assert comparison.first_difference() is None, (
        f"token {comparison.first_difference()} differs:\n{comparison.plain.sequences}\n{comparison.assisted_ids}"
    )
    assert torch.equal(comparison.plain_state, comparison.assisted_state), "another number of random draws"
    if isinstance(comparison.assisted, torch.Tensor):
        return
    assert_close(comparison.plain.scores, comparison.assisted.scores, FP32_ROUNDING)
    assert_close(comparison.plain.hidden_states, comparison.assisted.hidden_states, FP64_ROUNDING)


def assert_close(expected: Any, actual: Any, tolerance: float) -> None:
    """Nested tuples of tensors of the same shapes and, relative to the largest entry of each, the same values."""
    if isinstance(expected, torch.Tensor):
        assert expected.shape == actual.shape and expected.dtype == actual.dtype
        finite = expected.isfinite()
        assert torch.equal(finite, actual.isfinite()), "other tokens are excluded"
        assert torch.equal(expected[~finite], actual[~finite])
        if finite.any():
            # Relative to 1 at least: processors may leave only scores near zero, of logits that are not.
            error = (expected[finite] - actual[finite]).abs().max() / expected[finite].abs().max().clamp(min=1)
            assert error <= tolerance, f"off by {error.item():.1e}"
        return
    assert len(expected) == len(actual)
    for one, other in zip(expected, actual, strict=True):
        assert_close(one, other, tolerance)


def prove_ties(comparison: Comparison, name: str, in_fp64: Callable[[], Comparison]) -> Tie | None:
    """The fp32 promise: `None` for the same text, the tie for a difference proven to be one; else a failure."""
    index = comparison.first_difference()
    if index is None:
        assert torch.equal(comparison.plain_state, comparison.assisted_state), "another number of random draws"
        return None
    lengths = comparison.plain.sequences.shape[1], comparison.assisted_ids.shape[1]
    assert comparison.prompt_length + index < min(lengths), f"{name}: one text is cut short, {lengths}"
    gap = comparison.gap(index)
    assert gap <= TIE, f"{name}: token {index} differs, candidates {gap:.1e} apart in plain decoding"
    with truly_fp64():
        assert_identical(in_fp64())
    return Tie(name, index, gap)


class TieReport:
    """A pytest plugin that lists the ties of a run in its summary."""

    def __init__(self):
        self.cases = 0
        self.ties: list[Tie] = []

    def add(self, tie: Tie | None) -> None:
        self.cases += 1
        self.ties += [tie] if tie else []

    def pytest_terminal_summary(self, terminalreporter) -> None:
        if self.cases:
            terminalreporter.section(f"exactness in fp32: {self.cases} cases, {len(self.ties)} proven ties")
        for tie in self.ties:
            terminalreporter.write_line(str(tie))


# --- cases


def covering_cases(factors: dict[str, Iterable[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Few cases in which every two levels of every two factors meet; greedily found, the same for the same seed."""
    rng = random.Random(seed)
    levels = {name: list(values) for name, values in factors.items()}
    open_pairs = {
        ((one, a), (other, b))
        for one, other in itertools.combinations(levels, 2)
        for a in levels[one]
        for b in levels[other]
    }

    def covered(case: dict[str, Any]) -> set:
        return {pair for pair in itertools.combinations(case.items(), 2) if pair in open_pairs}

    cases = []
    while open_pairs:
        best: dict[str, Any] = {}
        for _ in range(20):
            first = dict(rng.choice(sorted(open_pairs, key=repr)))
            case = {name: first.get(name, rng.choice(values)) for name, values in levels.items()}
            for name in rng.sample(list(levels), len(levels)):
                if name not in first:
                    case[name] = max(levels[name], key=lambda level: len(covered(case | {name: level})))  # noqa: B023
            if len(covered(case)) > len(covered(best)):
                best = case
        cases.append(best)
        open_pairs -= covered(best)
    return cases


SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "temperature": {"do_sample": True, "temperature": 0.6, "top_k": 0},
    "top_k": {"do_sample": True, "top_k": 7},
    "top_p": {"do_sample": True, "top_k": 0, "top_p": 0.8},
    "min_p": {"do_sample": True, "top_k": 0, "min_p": 0.1, "temperature": 1.3},
}

KNOBS: dict[str, dict[str, int]] = {
    "root only": {"tree_size": 1, "depth": 3, "branching": 2, "contemplation": 0},
    "root only, f": {"tree_size": 1, "depth": 3, "branching": 2, "contemplation": 1},
    "chain": {"tree_size": 6, "depth": 12, "branching": 1, "contemplation": 6},
    "chain without f": {"tree_size": 5, "depth": 4, "branching": 1, "contemplation": 0},
    "small": {"tree_size": 8, "depth": 3, "branching": 3, "contemplation": 8},
    "sparse": {"tree_size": 30, "depth": 5, "branching": 10, "contemplation": 4},
    "root's f": {"tree_size": 16, "depth": 4, "branching": 4, "contemplation": 1},
    "EAGLE-3": {"tree_size": 30, "depth": 6, "branching": 10, "contemplation": 0},
    "paper": {"tree_size": 60, "depth": 6, "branching": 10, "contemplation": 60},
    "automatic": {},
    "automatic, EAGLE-3": {"contemplation": 0},
    "more rows than nodes": {"tree_size": 4, "depth": 2, "branching": 2, "contemplation": 99},
}

PROCESSING: dict[str, Callable[[list[int]], dict[str, Any]]] = {
    # From the text that plain greedy decoding writes without them, so that each of them changes something.
    "none": lambda text: {},
    "eos": lambda text: {"eos_token_id": [text[5], text[7]]},
    "repetition_penalty": lambda text: {"repetition_penalty": 1.4},
    "no_repeat_ngram_size": lambda text: {"no_repeat_ngram_size": 2},
    "min_new_tokens": lambda text: {"min_new_tokens": 8, "eos_token_id": text[3]},
    "bad_words_ids": lambda text: {"bad_words_ids": [[text[2]], text[5:7]]},
    "forced_eos_token_id": lambda text: {"forced_eos_token_id": text[1], "eos_token_id": text[1]},
    "sequence_bias": lambda text: {"sequence_bias": [[[text[4]], -9.0], [text[1:3], 4.0]]},
    "suppress_tokens": lambda text: {"suppress_tokens": text[3:6], "begin_suppress_tokens": text[:1]},
    "guidance_scale": lambda text: {"guidance_scale": 1.5},  # runs the target itself, with a cache of its own
    "exponential_decay_length_penalty": lambda text: {
        "exponential_decay_length_penalty": (4, 1.5),
        "eos_token_id": text[6],
    },
    "renormalize_logits": lambda text: {"renormalize_logits": True, "typical_p": 0.9},
}


def every_third_token(batch_id: int, input_ids: torch.LongTensor) -> list[int]:
    """A `prefix_allowed_tokens_fn` whose answer depends on the whole prefix."""
    return list(range(int(input_ids.sum()) % 3, 90, 3))
