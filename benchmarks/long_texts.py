"""
Automatic rounds behind short and long texts, by the clock: the same questions, behind as much other text as fills a
context.

Timed is what follows the first token; the forward over the prompt, the same with and without a draft, is not. Beside
the speed-up stand tau, which another text changes too, and what a round takes in tokens of plain `generate`.

    OMP_NUM_THREADS=1 python benchmarks/long_texts.py questions.jsonl
"""

import argparse
import time
from statistics import median
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from transformers_confu.common.loading import default_draft, default_dtype, load_decoding_draft, load_target
from transformers_confu.evaluation.questions import load_questions


NEW_TOKENS = 64
TEMPLATE = 40  # tokens, at most, that the chat template adds


class Watch(BaseStreamer):
    """Notes when the prompt and each token come."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """The text is over."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Automatic rounds behind short and long texts.")
    parser.add_argument("questions", help="as of `confu evaluate`; short ones are asked behind long ones")
    parser.add_argument("--number", type=int, default=4, help="questions asked")
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 4096], help="tokens of the prompts")
    parser.add_argument("--dtype", default=default_dtype())
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    target, tokenizer = load_target("demo", options.dtype, "cpu")
    draft = load_decoding_draft(default_draft(), target)
    turns = sorted((question.turns[0] for question in load_questions(options.questions)), key=len)
    half = len(turns) // 2
    text = tokenizer("\n\n".join(turns[half:]), verbose=False)["input_ids"]
    ways: dict[str, dict[str, Any]] = {"plain": {}, "automatic": {"assistant_model": draft}}
    seconds = {(context, way): [0.0] * options.runs for context in options.contexts for way in ways}
    rounds = dict.fromkeys(options.contexts, 0)
    for run in range(options.runs):
        for number in range(options.number):
            question, start = turns[number * half // options.number], number * len(text) // options.number
            for context in options.contexts:
                length = context - len(tokenizer(question)["input_ids"]) - TEMPLATE
                before = tokenizer.decode(text[start : start + length])
                prompt = tokenizer.apply_chat_template(
                    [{"role": "user", "content": f"{before}\n\n{question}"}],
                    add_generation_prompt=True, return_tensors="pt", return_dict=True,
                )  # fmt: skip
                limits = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
                for way, call in ways.items():
                    watch = Watch()
                    target.generate(**prompt, **call, **limits, streamer=watch)
                    seconds[context, way][run] += watch.times[-1] - watch.times[1]
                rounds[context] += draft.last_statistics.rounds
    for context in options.contexts:
        plain, automatic = seconds[context, "plain"], seconds[context, "automatic"]
        speedups = [a / b for a, b in zip(plain, automatic, strict=True)]
        tokens = (NEW_TOKENS - 1) * options.number
        tau = tokens * options.runs / rounds[context]
        print(
            f"{options.dtype}, {context} tokens: {median(speedups):.2f} times plain generate ({min(speedups):.2f} to "
            f"{max(speedups):.2f}), tau {tau:.2f}; a round takes {tau / median(speedups):.2f} plain tokens, of "
            f"{1000 * median(plain) / tokens:.1f} ms each"
        )


if __name__ == "__main__":
    main()
