"""Assisted decoding writes what plain `generate` writes. What that means exactly: `exactness.py`."""

import copy
import functools
import random
from pathlib import Path

import pytest
import torch

from exactness import (
    KNOBS,
    PROCESSING,
    SAMPLING,
    TieReport,
    always_wrong,
    assert_identical,
    compare,
    covering_cases,
    decode_plainly,
    every_third_token,
    oracle_tree,
    prove_ties,
    truly_fp64,
)
from helpers import make_tiny_draft, make_tiny_target
from transformers_confu import ConFuDraftModel
from transformers_confu.inference.target import TargetRunner


TRAINED_DRAFT = Path(__file__).parents[2] / "hub_cards" / "confu-smollm2-135m-instruct"
NEW_TOKENS = 16


# --- tiny targets in fp64


@pytest.fixture(autouse=True)
def wide(request):
    """Only for the tiny targets: the real one is fp32."""
    if request.node.get_closest_marker("slow"):
        yield
    else:
        with truly_fp64():
            yield


@functools.cache
def tiny_target(kind: str, attention: str):
    target = make_tiny_target(kind, attn_implementation=attention)
    assert target.config._attn_implementation == attention
    return target


@functools.cache
def tiny_draft(kind: str):
    return make_tiny_draft(tiny_target(kind, "sdpa"), draft_vocab_size=60)


@functools.cache
def tiny_prompt(length: int) -> torch.LongTensor:
    return torch.randint(2, 97, (1, length), generator=torch.Generator().manual_seed(length))


@functools.cache
def tiny_plain(kind: str, attention: str, length: int, sampling: str, processing: str, seed: int):
    """Options of a case, and what plain decoding makes of it."""
    target, prompt = tiny_target(kind, attention), tiny_prompt(length)
    undisturbed = target.generate(prompt, do_sample=False, max_new_tokens=NEW_TOKENS)[0, length:].tolist()
    options = {"max_new_tokens": NEW_TOKENS} | SAMPLING[sampling]
    call = dict
    if processing == "prefix_allowed_tokens_fn":
        call = functools.partial(dict, prefix_allowed_tokens_fn=every_third_token)
    else:
        options |= PROCESSING[processing](undisturbed)
    return options, call, decode_plainly(target, prompt, options, seed, call)


FACTORS = {
    "kind": ["llama", "qwen3", "windows", "hybrid"],
    "attention": ["sdpa", "eager"],
    "length": [1, 2, 9],
    "sampling": list(SAMPLING),
    "processing": [*PROCESSING, "prefix_allowed_tokens_fn"],
    "knobs": list(KNOBS),
    "draft": ["random", "wrong", "oracle", "oracle "],
    "record": [True, False],
}


def run_tiny(case: dict, seed: int) -> None:
    plain_case = {name: case[name] for name in ("kind", "attention", "length", "sampling", "processing")}
    options, call, plain = tiny_plain(**plain_case, seed=seed)
    draft = tiny_draft(case["kind"])
    if case["draft"] == "wrong":
        draft = always_wrong(draft, plain[0].sequences)
    comparison = compare(
        tiny_target(case["kind"], case["attention"]),
        draft,
        tiny_prompt(case["length"]),
        options,
        KNOBS[case["knobs"]],
        seed=seed,
        record=case["record"],
        oracle=case["draft"].startswith("oracle"),
        call=call,
        plain=plain,
    )
    assert_identical(comparison)
    if case["draft"] == "wrong":
        assert sum(comparison.statistics.accepted) == 0


@pytest.mark.parametrize("seed", range(2))
def test_every_two_settings_together(seed, exactness_scope):
    for round_ in range(1 if exactness_scope == "sample" else 20):
        for case in covering_cases(FACTORS, seed=seed + 100 * round_):
            try:
                run_tiny(case, seed)
            except Exception as error:
                error.add_note(f"seed {seed}, {case}")
                raise


@pytest.mark.parametrize("sampling", ["greedy", "temperature"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "windows", "hybrid"])
def test_long_acceptances_through_later_siblings(kind, sampling):
    # Much has to be accepted, along nodes that are neither first children nor neighbours: else this proves little.
    target, draft = tiny_target(kind, "sdpa"), tiny_draft(kind)
    moved = later_siblings = deep = 0
    for seed in range(6):
        comparison = compare(
            target,
            draft,
            tiny_prompt(4),
            {"max_new_tokens": 40} | SAMPLING[sampling],
            {"tree_size": 24, "depth": 8, "branching": 4, "contemplation": 24 if seed % 2 else 3},
            seed=seed,
            oracle=True,
        )
        assert_identical(comparison)
        assert comparison.statistics.tau > 2
        paths = comparison.oracle.paths
        assert [len(path) for path in paths] == comparison.statistics.emitted
        moved += sum(path != list(range(len(path))) for path in paths)
        later_siblings += sum(len(path) > 1 and path[1] > 1 for path in paths)
        deep += sum(len(path) > 4 for path in paths)
    assert min(moved, later_siblings, deep) >= 5


def test_an_oracle_tree_is_a_tree_with_the_text_in_it():
    rng = random.Random(0)
    for _ in range(50):
        tree = oracle_tree(3, [7, 8, 9], tree_size=20, max_depth=4, vocab_size=30, rng=rng)
        children = tree.children()[0]
        assert len(children) == tree.size - 1  # no two siblings with one token
        assert all(parent < node for node, parent in enumerate(tree.parents[0].tolist()) if node)
        assert tree.depths.max() <= 4
        node = 0
        for token in (7, 8):
            node = children[node, token]


def test_covering_cases_cover_every_pair():
    factors = {"a": [1, 2, 3], "b": "xy", "c": [True, False], "d": range(4)}
    cases = covering_cases(factors, seed=1)
    for one in factors:
        for other in factors:
            met = {(case[one], case[other]) for case in cases}
            assert one == other or len(met) == len(list(factors[one])) * len(list(factors[other]))
    assert len(cases) <= 20
    assert cases == covering_cases(factors, seed=1)


# --- what the harness itself must catch


def test_the_harness_notices_a_wrong_engine(monkeypatch):
    def keep_first_rows(runner, cache, prefix_length, path, compact=TargetRunner.compact):
        compact(runner, cache, prefix_length, list(range(len(path))))

    monkeypatch.setattr(TargetRunner, "compact", keep_first_rows)
    with pytest.raises(AssertionError):
        for seed in range(4):
            options = {"max_new_tokens": 30, "do_sample": False}
            comparison = compare(
                tiny_target("llama", "sdpa"),
                tiny_draft("llama"),
                tiny_prompt(4),
                options,
                KNOBS["EAGLE-3"],
                seed=seed,
                oracle=True,
            )
            assert_identical(comparison)


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_tie_is_told_from_an_error(do_sample):
    target, draft, prompt = tiny_target("llama", "sdpa"), tiny_draft("llama"), tiny_prompt(5)
    options = {"max_new_tokens": 10, "do_sample": do_sample}
    same = compare(target, draft, prompt, options)
    assert prove_ties(same, "same", in_fp64=lambda: same) is None

    other = compare(target, draft, prompt, options)
    ids = other.assisted_ids
    scores = other.plain.scores[4][0].softmax(-1)
    ids[0, 5 + 4] = scores.scatter(0, ids[0, 5 + 4], -1.0).argmax()  # another token than plain's
    assert other.first_difference() == 4
    with pytest.raises(AssertionError, match="token 4 differs"):
        prove_ties(other, "wrong", in_fp64=lambda: same)

    # Let the two candidates tie: nearly equal scores for a greedy choice, the more so for a draw's scores and noise.
    gap = other.gap(4)
    assert gap > 0
    other.plain.scores[4][0, ids[0, 5 + 4]] += gap - 5e-5
    tie = prove_ties(other, "tie", in_fp64=lambda: same)
    assert tie.index == 4 and 0 < tie.gap < 1e-4
    with pytest.raises(AssertionError):
        prove_ties(other, "tie", in_fp64=lambda: other)  # not identical in fp64: no tie of rounding


# --- the real target in fp32


@pytest.fixture(scope="module")
def tie_report(request):
    report = TieReport()
    request.config.pluginmanager.register(report)
    return report


@pytest.fixture(scope="module")
def real_drafts(smollm2):
    target, _ = smollm2
    sizes = {"draft_vocab_size": 8192, "num_soft_prompts": 16, "target_hidden_state_indices": None}
    drafts = {"random": make_tiny_draft(target, initializer_range=0.02, **sizes)}
    if (TRAINED_DRAFT / "model.safetensors").exists():
        drafts["trained"] = ConFuDraftModel.from_pretrained(TRAINED_DRAFT, dtype=torch.float32)
    return drafts


@pytest.fixture(scope="module")
def real_prompts(smollm2):
    """Prompts by length, 1 to 1,000 tokens; the long ones are a short one over and over."""
    _, tokenizer = smollm2
    question = [{"role": "user", "content": "Explain in a few sentences why the sky is blue and sunsets are red."}]
    chat = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    chat = chat["input_ids"]
    return {
        "1": torch.tensor([[tokenizer.bos_token_id]]),
        "chat": chat,
        "200": chat.repeat(1, 20)[:, -200:],
        "1000": chat.repeat(1, 80)[:, -1000:],
    }


REAL_FACTORS = {
    "prompt": ["1", "chat", "200", "1000"],
    "sampling": ["greedy", "temperature", "top_p", "top_k"],
    "processing": ["none", "repetition_penalty", "no_repeat_ngram_size", "min_new_tokens"],
    "knobs": ["automatic", "chain", "small", "sparse", "EAGLE-3", "paper"],
    "draft": ["random", "oracle", "trained"],
}


@pytest.mark.slow
def test_the_real_target_in_fp32(smollm2, real_drafts, real_prompts, tie_report, exactness_scope):
    target, _ = smollm2
    factors = REAL_FACTORS | {"draft": [name for name in REAL_FACTORS["draft"] if name in {*real_drafts, "oracle"}]}
    new_tokens = 16 if exactness_scope == "sample" else 64
    seeds = range(1 if exactness_scope == "sample" else 8)
    in_fp64 = functools.cache(lambda model: copy.deepcopy(model).double())
    undisturbed = {
        name: target.generate(ids, do_sample=False, min_new_tokens=16, max_new_tokens=16)[0, ids.shape[1] :].tolist()
        for name, ids in real_prompts.items()
    }
    accepted = 0
    for seed in seeds:
        for case in covering_cases(factors, seed):
            options = {"max_new_tokens": new_tokens} | SAMPLING[case["sampling"]]
            options |= PROCESSING[case["processing"]](undisturbed[case["prompt"]])
            draft = real_drafts.get(case["draft"], real_drafts["random"])

            def run(target=target, draft=draft, case=case, options=options, seed=seed):
                return compare(
                    target,
                    draft,
                    real_prompts[case["prompt"]],
                    options,
                    KNOBS[case["knobs"]],
                    seed=seed,
                    record=False,
                    oracle=case["draft"] == "oracle",
                )

            comparison = run()
            name = f"seed {seed}, {', '.join(f'{factor} {level}' for factor, level in case.items())}"
            tie_report.add(
                prove_ties(comparison, name, in_fp64=lambda run=run, draft=draft: run(in_fp64(target), in_fp64(draft)))
            )
            accepted += sum(comparison.statistics.accepted)
    assert accepted > 20  # no proof by refusals alone
