"""Answers with a draft before it is published: are they plain `generate`'s, and what do future predictions add?"""

import statistics
from collections.abc import Sequence

from tqdm.auto import tqdm
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from ..common.texts import TIE, first_difference
from ..inference.knobs import confu_generation_config


CHECK_PROMPTS = [
    "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "Write a Python function that returns the n-th Fibonacci number, and explain how it works.",
    "A train travels 60 miles in 1.5 hours. What is its average speed, and how far does it travel in 4 hours? "
    "Explain step by step.",
    "Summarize in two sentences: The honey bee is a social insect. A colony consists of one queen, some hundred "
    "drones and tens of thousands of workers. The workers gather nectar and pollen, build the comb, feed the brood "
    "and guard the hive. By carrying pollen from flower to flower, bees make many plants bear fruit, among them a "
    "large part of the crops that people eat.",
    "Translate into French: Good morning! The train to Paris leaves at nine, and I still have to buy a ticket.",
]
CHECK_TOKENS = 64
GAIN_TREE = {"confu_tree_size": 16, "confu_depth": 4, "confu_branching": 8}


def check_exactness(
    target: PreTrainedModel, draft: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> str:
    """
    Greedy answers with and without a draft; what was found, as a sentence for the card.

    ValueError if an answer differs in a way that rounding does not explain. In half precision it is only counted.
    """
    dtype = str(target.dtype).removeprefix("torch.")
    identical, ties, emitted = 0, 0, []
    options = {"do_sample": False, "max_new_tokens": CHECK_TOKENS}
    for prompt in tqdm(prompts, desc="Checking", unit="answer"):
        inputs = encode(prompt, tokenizer).to(target.device)
        length = inputs["input_ids"].shape[1]
        plain = target.generate(**inputs, **options, return_dict_in_generate=True, output_scores=True)
        expected = plain.sequences[0, length:].tolist()
        ids = target.generate(**inputs, **options, assistant_model=draft, return_dict_in_generate=False)
        found = ids[0, length:].tolist()
        emitted += draft.last_statistics.emitted
        place = first_difference(expected, found)
        if place is None:
            identical += 1
            continue
        gap = float("inf")  # one answer goes on where the other ends
        if place < min(len(expected), len(found)):
            gap = float(plain.scores[place][0, expected[place]] - plain.scores[place][0, found[place]])
        if gap <= TIE:
            ties += 1
        elif dtype in ("float32", "float64"):
            raise ValueError(
                f"With this draft the answer to {prompt!r} is not plain generate's: it differs from token {place + 1} "
                f"on, where the scores differ by {gap:.2g}. That is a fault of the decoding code, not of the draft; "
                "please report it. Nothing was published."
            )
    parting = f", {ties} part at a tie of two scores" if ties else ""
    tau = f"; tau {sum(emitted) / len(emitted):.2f}" if emitted else ""
    return (
        f"A check before publishing: of {len(prompts)} greedy answers of up to {CHECK_TOKENS} tokens, target in "
        f"{dtype}, {identical} equal plain `generate`'s{parting}{tau}."
    )


def measure_future_gain(
    target: PreTrainedModel, draft: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> str:
    """
    Measure `confu_future_gain` and write it into the draft's generation config: tau with a contemplate row for every
    node, less tau without any, of greedy answers by trees of 16 nodes. What was measured, or why nothing was, as a
    sentence for the card.
    """
    if getattr(draft.generation_config, "confu_contemplation", None) == 0:
        return "`confu_future_gain` was not measured: the future channel is untrained (`confu_contemplation` is 0)."
    taus, variances = [], []
    for rows in (0, GAIN_TREE["confu_tree_size"]):
        config = confu_generation_config(
            target, do_sample=False, max_new_tokens=CHECK_TOKENS, confu_contemplation=rows, **GAIN_TREE
        )
        emitted: list[int] = []  # by each round of each answer
        for prompt in tqdm(prompts, desc=f"Measuring the gain, C = {rows}", unit="answer"):
            inputs = encode(prompt, tokenizer).to(target.device)
            target.generate(**inputs, assistant_model=draft, generation_config=config)
            emitted += draft.last_statistics.emitted
        if len(emitted) < 2:
            return "`confu_future_gain` was not measured: the answers ended before their second round."
        taus.append(statistics.mean(emitted))
        variances.append(statistics.variance(emitted) / len(emitted))
    gain, error = round(taus[1] - taus[0], 2), sum(variances) ** 0.5
    # What is not shown to add anything is not run: automatic rounds would pay for its rows.
    written = gain if gain > error else min(gain, 0.0)
    draft.generation_config.confu_future_gain = written
    return (
        f"`confu_future_gain` {written}, from a gain of {gain} (standard error {error:.2f}; more prompts make it "
        f"smaller, and a gain within it counts as none): tau "
        f"{taus[1]:.2f} with future predictions, {taus[0]:.2f} without, over {len(emitted)} rounds of {len(prompts)} "
        f"greedy answers of up to {CHECK_TOKENS} tokens, by trees of {GAIN_TREE['confu_tree_size']} nodes."
    )


def encode(prompt: str, tokenizer: PreTrainedTokenizerBase) -> BatchEncoding:
    """A prompt as the target's users would put it: a chat turn where there is a chat template."""
    if tokenizer.chat_template is None:
        return tokenizer(prompt, return_tensors="pt")
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
