"""
How much faster continuous batches answer prompts than plain batched `generate`:

    python examples/benchmark_regeneration.py --prompts prompts.jsonl --num_prompts 128 --batch_size 32

Both arms answer the same prompts in one process and take turns, every other round in the opposite order; longest
prompts first. Plain `generate` takes them in batches, padded on the left, each as long as its longest answer. Only
tokens of answers count, up to the one that ends them; what plain `generate` computes behind an end does not. At
temperature 0 the two give the same answers but for the rounding of kernels.
"""

import argparse
import random
import time
from collections.abc import Callable
from statistics import median

import torch
from _targets import example_arguments, load_target
from transformers import PreTrainedModel

from transformers_confu.data import load_rows
from transformers_confu.data.continuous_batching import Request, answer, end_token_ids
from transformers_confu.data.dataset import encode_prompt
from transformers_confu.evaluation.machine import describe_machine, synchronise


Answers = list[list[int]]


def plain(target: PreTrainedModel, prompts: Answers, arguments: argparse.Namespace) -> Answers:
    """Answers of batched `generate`, each cut behind the token that ends it."""
    ends = end_token_ids(target)
    answers = []
    for first in range(0, len(prompts), arguments.batch_size):
        batch = prompts[first : first + arguments.batch_size]
        longest = max(map(len, batch))
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in batch], device=target.device)
        input_ids = torch.tensor([[ends[0]] * (longest - len(ids)) + ids for ids in batch], device=target.device)
        outputs = target.generate(
            input_ids,
            attention_mask=mask,
            max_new_tokens=arguments.max_new_tokens,
            pad_token_id=ends[0],
            do_sample=arguments.temperature > 0,
            temperature=arguments.temperature or None,
        )
        for ids in outputs[:, longest:].tolist():
            end = next((place for place, token in enumerate(ids) if token in ends), len(ids) - 1)
            answers.append(ids[: end + 1])
    return answers


def continuous(target: PreTrainedModel, prompts: Answers, arguments: argparse.Namespace) -> Answers:
    """Answers of the batches that `confu data regenerate` uses."""
    requests = [Request(ids, arguments.temperature, seed) for seed, ids in enumerate(prompts)]
    capacity = len(prompts[0]) + arguments.max_new_tokens
    for _ in answer(target, requests, arguments.batch_size, capacity, arguments.max_new_tokens):
        pass
    return [request.answer_ids for request in requests]


def timed(run: Callable[..., Answers], *arguments) -> tuple[float, Answers]:
    """Seconds, and the answers."""
    started = time.perf_counter()
    answers = run(*arguments)
    synchronise(arguments[0].device)
    return time.perf_counter() - started, answers


def main() -> None:
    parser = example_arguments(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--prompts", required=True, help="rows of `prompt`, as `confu data prompts` writes them")
    parser.add_argument("--num_prompts", type=int, default=128, help="prompts to answer, drawn from the file")
    parser.add_argument("--batch_size", type=int, default=32, help="answers at once")
    parser.add_argument("--max_prompt_length", type=int, default=256, help="longer prompts take no part")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()

    target, tokenizer = load_target(arguments.tiny)
    encoded = [encode_prompt(row["prompt"], tokenizer) for row in load_rows(arguments.prompts)]
    fitting = [ids for ids in encoded if len(ids) <= arguments.max_prompt_length]
    prompts = random.Random(0).sample(fitting, min(arguments.num_prompts, len(fitting)))
    prompts.sort(key=len, reverse=True)

    arms = {"plain generate": plain, "continuous batches": continuous}
    rates: dict[str, list[float]] = {name: [] for name in arms}
    answers: dict[str, Answers] = {}
    for number in range(arguments.rounds):
        for name in reversed(arms) if number % 2 else arms:
            seconds, answers[name] = timed(arms[name], target, prompts, arguments)
            tokens = sum(map(len, answers[name]))
            rates[name].append(tokens / seconds)
            print(f"round {number + 1} of {arguments.rounds}, {name}: {tokens} tokens, {seconds:.1f} s", flush=True)

    pairs = list(zip(*answers.values(), strict=True))
    print(f"\n{len(prompts)} prompts; equal answers: {sum(one == other for one, other in pairs)}")
    print(", ".join(f"{name}: {value}" for name, value in describe_machine(target.device).items()), end="\n\n")
    print("| arm | tokens/s | times plain (least to greatest) |\n|---|---|---|")
    for name, rate in rates.items():
        ratios = [one / other for one, other in zip(rate, rates["plain generate"], strict=True)]
        print(f"| {name} | {median(rate):.0f} | {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |")


if __name__ == "__main__":
    main()
