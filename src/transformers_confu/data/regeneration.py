"""
On-policy training data: the target itself answers the prompts.

A draft learns to foretell the target, so it has to see what the target says, not what a person or another model
said. Half of the answers are greedy and half sampled by default; they are kept as token ids.

    confu data regenerate --target demo --prompts prompts.jsonl --output answers.jsonl
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import HfArgumentParser, PreTrainedModel, PreTrainedTokenizerBase

from ..common.answer_text import end_token_ids
from ..common.loading import TargetOptions, default_dtype
from ..common.option_files import option
from ..inference.checks import check_target
from ..inference.configuration_confu import ConFuConfig
from ..inference.target import input_device
from .answers import AnswerArguments, AnswerFile, Conversation, RegenerationReport
from .fingerprints import fingerprint_of_target
from .rows import load_rows


@torch.no_grad()
def regenerate(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[Mapping[str, Any]],
    output_path: str | Path,
    *,
    max_new_tokens: int,
    batch_size: int,
    max_prompt_length: int,
    temperatures: Sequence[float] = (0.0, 0.8),
    seed: int = 0,
) -> RegenerationReport:
    """
    Let the target answer prompts in batches, and append the answers of each batch to a JSONL file.

    Prompts take the temperatures in turn. Those of one temperature are sorted by length, longest first (memory runs
    out at once or not at all), and answered in batches by `generate`; other settings than the temperature are those of
    the target's `generation_config`. The turns of a conversation are answered one after the other.

    A row is `{id, messages, prompt_ids, answer_ids, temperature, finished, made_with}` and what its prompt says of the
    chat template and its source: `prompt_ids` and `answer_ids` have one list for each answer; an answer includes the
    token that ended it; `finished` is False if the last one was cut; `made_with` holds name and hash of the target,
    its settings and the seed. `prepare_dataset` takes these rows as they are.

    The same call resumes an interrupted one, with the same draws where whole batches were written. The global random
    state is not touched.

    Args:
        target: In evaluation mode; one that a draft can serve, see `check_target`.
        prompts: Rows of `id` and `prompt` or `turns`; see [`Conversation`].
        output_path: The `.jsonl` file, created if missing.
        batch_size: Conversations answered at once. Memory holds as many rows of the longest prompt and answer.
        max_prompt_length: Longer prompts (in tokens, template included) are skipped and counted.
        temperatures: One or more; 0 means greedy.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1.")
    _check_target(target, max_prompt_length + max_new_tokens)
    name = target.config.name_or_path
    made_with = {
        "target_name": Path(name).name if Path(name).exists() else name,  # no paths of this machine
        # As rounded to bf16: answers count as the target's own in whatever dtype it is loaded.
        "target": fingerprint_of_target(target, torch.bfloat16),
        "generation": _generation_settings(target),
        "max_new_tokens": max_new_tokens,
        "seed": seed,
    }
    answers = AnswerFile(output_path, prompts, temperatures, made_with)
    lengths = {conversation.id: len(conversation.next_prompt(tokenizer)) for conversation in answers.unanswered}
    fitting = [conversation for conversation in answers.unanswered if lengths[conversation.id] <= max_prompt_length]
    answers.report.too_long = len(answers.unanswered) - len(fitting)
    fitting.sort(key=lambda conversation: (conversation.temperature, -lengths[conversation.id]))
    with tqdm(total=len(fitting), unit="answer", desc="Regenerating") as progress:
        for _, group in groupby(fitting, key=attrgetter("temperature")):
            while batch := list(islice(group, batch_size)):
                _answer(target, tokenizer, batch, max_new_tokens, max_prompt_length, seed)
                answers.write(batch)
                progress.update(len(batch))
    return answers.report


def _answer(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: list[Conversation],
    max_new_tokens: int,
    max_prompt_length: int,
    seed: int,
) -> None:
    """Answer all turns of a batch of conversations of one temperature."""
    ends = set(end_token_ids(target))
    temperature = batch[0].temperature
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    # A seed of its own for each batch: a resumed run draws what an uninterrupted one draws.
    content = json.dumps([seed, temperature, [conversation.id for conversation in batch]])
    own_seed = int.from_bytes(hashlib.sha256(content.encode()).digest()[:7], "big")
    device = input_device(target)
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(own_seed)
        # The first turn's prompts fit; those of later ones may have grown too long.
        while asked := [
            (conversation, prompt)
            for conversation in batch
            if len(prompt := conversation.next_prompt(tokenizer)) <= max_prompt_length
        ]:
            answers = _generate(target, [prompt for _, prompt in asked], ends, max_new_tokens, sampling)
            batch = [
                conversation
                for (conversation, prompt), answer in zip(asked, answers, strict=True)
                if conversation.add(prompt, answer, answer[-1] in ends, tokenizer)
            ]


def _generate(
    target: PreTrainedModel, prompts: list[list[int]], ends: set[int], max_new_tokens: int, sampling: dict[str, Any]
) -> list[list[int]]:
    """The answers to a batch of prompts, each with the token that ended it."""
    longest = max(map(len, prompts))
    padding = min(ends, default=0)
    device = input_device(target)
    input_ids = torch.tensor([[padding] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    attention_mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    outputs = target.generate(
        input_ids,
        attention_mask=attention_mask.to(device),
        max_new_tokens=max_new_tokens,
        pad_token_id=padding,
        num_return_sequences=1,
        return_dict_in_generate=False,
        **sampling,
    )
    answers = outputs[:, longest:].tolist()
    lengths = [next((place for place, token in enumerate(ids, 1) if token in ends), len(ids)) for ids in answers]
    return [ids[:length] for ids, length in zip(answers, lengths, strict=True)]


def _check_target(target: PreTrainedModel, num_tokens: int) -> None:
    if target.training:
        raise ValueError("The target is in training mode, so dropout would change its answers: call target.eval().")
    check_target(target, ConFuConfig.from_target(target.config))
    if target.generation_config.stop_strings:
        raise ValueError(
            "The target's generation_config has stop_strings, which would end an answer within a token: unset them in "
            "`target.generation_config`."
        )
    context = getattr(target.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and num_tokens > context:
        raise ValueError(
            f"The longest prompt and answer take {num_tokens} tokens, the target's context has {context}: lower "
            "max_prompt_length or max_new_tokens."
        )


def _generation_settings(target: PreTrainedModel) -> dict[str, Any]:
    """What a target's `generation_config` sets besides what every call says for itself; JSON."""
    settings = {
        name: value
        for name, value in target.generation_config.to_diff_dict().items()
        if name not in ("do_sample", "temperature", "max_length", "max_new_tokens", "use_cache", "pad_token_id")
        and name not in ("transformers_version", "_from_model_config")  # saving and loading set them
        and value is not False  # as when not set
    }
    return json.loads(json.dumps(settings, default=str))  # as it comes back from a file


@dataclass(kw_only=True)
class RegenerationArguments(AnswerArguments):
    """Of the command line."""

    target: str = option("Model id or folder of the target, or 'demo' for a small public model.", ...)
    batch_size: int = option("Conversations answered at once.", 64)
    dtype: str = option("Data type of the target; bfloat16 where the hardware computes in it.", default_dtype)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `regenerate` from the command line."""
    parser = HfArgumentParser((RegenerationArguments, TargetOptions))
    arguments, options = parser.parse_args_into_dataclasses(args=argv)
    settings = dict(vars(arguments))
    name, dtype, prompts, output = (settings.pop(name) for name in ("target", "dtype", "prompts", "output"))
    prompts = load_rows(prompts)
    target, tokenizer = options.load(name, dtype)
    print(regenerate(target, tokenizer, prompts, output, **settings))
