"""On-policy training data: the target itself answers the prompts.

A draft learns to foretell the target, so it has to see what the target says, not what a person or another model
said. Half of the answers are greedy and half sampled by default; they are kept as token ids.

    confu data regenerate --target demo --prompts prompts.jsonl --output answers.jsonl
"""

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from tqdm.auto import tqdm
from transformers import (
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from ..common.jsonl import parse_json_object
from ..common.jsonl import read_jsonl as load_jsonl
from ..common.loading import default_device, default_dtype, load_target
from ..inference.checks import check_target
from ..inference.configuration_confu import ConFuConfig
from .chat_template import Messages, encode_prompt
from .continuous_batching import Request, answer, end_token_ids
from .conversations import TEMPLATE_FIELDS, count_turns, is_over, next_prompt
from .fingerprints import fingerprint_of_target
from .rows import load_rows


logger = logging.get_logger(__name__)


@dataclass
class RegenerationReport:
    """What one call of `regenerate` did.

    Attributes:
        prompts: prompts given.
        too_long: prompts skipped because they exceed `max_prompt_length`.
        resumed: answers found in the output of an earlier call.
        written: answers written by this call.
        unfinished: answers among the written ones that were cut at `max_new_tokens`.
        tokens: answer tokens written by this call.
        seconds: time spent generating and writing.
    """

    prompts: int = 0
    too_long: int = 0
    resumed: int = 0
    written: int = 0
    unfinished: int = 0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        return (
            f"prompts: {self.prompts:,}, of which too long: {self.too_long:,}, answered before: {self.resumed:,}\n"
            f"answers written: {self.written:,} ({self.tokens:,} tokens, {self.tokens_per_second:,.0f} tokens/s), "
            f"of which cut at the maximum length: {self.unfinished:,}"
        )


@dataclass(frozen=True)
class _Prompt:
    id: str | int
    prompt: str | Messages
    input_ids: list[int]
    template: dict[str, Any] = field(default_factory=dict)  # its `tools` and `chat_template_kwargs`


@dataclass(eq=False)
class _Planned(Request):
    """A request and the prompt that it answers."""

    prompt: _Prompt = field(kw_only=True)


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
    """Lets the target answer prompts and appends each answer to a JSONL file as it ends.

    Prompts are sorted by length, longest first (memory runs out at once or not at all), and take the temperatures in
    turn. All other settings are those of the target's `generation_config`. A row is
    `{id, prompt, answer, answer_ids, temperature, finished, made_with}`: `answer_ids` includes the token that ended
    the answer, `finished` is False if the answer was cut at `max_new_tokens`, `made_with` holds the seed, those
    settings and a hash of the target. `prepare_dataset` takes these rows as they are.

    An interrupted call is resumed by the same call: a torn last line is removed, answered prompts are skipped. Rows of
    an older version, without `made_with`, are taken for this call's, with a warning. Each answer is drawn from a seed
    of its own, so it is the same whatever is answered beside it, but for the rounding of kernels. The order of the
    rows is that in which answers ended. The global random state is not touched.

    Args:
        target: the model in evaluation mode, with full attention; see `check_target`.
        tokenizer: its tokenizer, with a chat template.
        prompts: rows with a unique `id` (string or integer) and `prompt` (one user turn, or messages), and with
            `tools` and `chat_template_kwargs` where the chat template wants them; these are handed on.
        output_path: the `.jsonl` file, created if missing.
        max_new_tokens: longest answer, in tokens.
        batch_size: prompts answered at once. Memory holds as many rows of the longest prompt and answer.
        max_prompt_length: longer prompts (in tokens, template included) are skipped and counted.
        temperatures: one or more; 0 means greedy.
        seed: seed of the sampling.

    Raises:
        ValueError: a setting or a prompt is invalid, the target cannot be run in rows of different lengths, or the
            output holds answers of another target, of other prompts, or of another seed, temperature or length.
    """
    output_path = Path(output_path)
    _check_settings(target, output_path, max_new_tokens, batch_size, max_prompt_length, temperatures)
    encoded = _encode_prompts(prompts, tokenizer)
    fitting = [prompt for prompt in encoded if len(prompt.input_ids) <= max_prompt_length]
    planned = _plan(fitting, temperatures, seed)

    made_with = {"target": fingerprint_of_target(target), "generation": generation_settings(target), "seed": seed}
    answered = _resume(output_path, planned, max_new_tokens, made_with) if output_path.exists() else set()
    missing = [request for request in planned if request.prompt.id not in answered]

    report = RegenerationReport(prompts=len(encoded), too_long=len(encoded) - len(fitting), resumed=len(answered))
    ends = end_token_ids(target)
    capacity = max((len(request.input_ids) for request in missing), default=0) + max_new_tokens
    start = time.perf_counter()
    output_path.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(output_path, "a", encoding="utf-8") as file,
        tqdm(total=len(fitting), initial=len(answered), unit="answer", desc="Regenerating") as progress,
    ):
        answers = answer(target, missing, min(batch_size, max(1, len(missing))), capacity, max_new_tokens)
        for request in cast(Iterator[_Planned], answers):
            finished = request.answer_ids[-1] in ends
            row = {
                "id": request.prompt.id,
                "prompt": request.prompt.prompt,
                "answer": tokenizer.decode(request.answer_ids, skip_special_tokens=True),
                "answer_ids": request.answer_ids,
                "temperature": request.temperature,
                "finished": finished,
                "made_with": made_with,
            } | request.prompt.template
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            report.written += 1
            report.unfinished += not finished
            report.tokens += len(request.answer_ids)
            report.seconds = time.perf_counter() - start
            progress.update()
            progress.set_postfix_str(f"{report.tokens_per_second:,.0f} tokens/s", refresh=False)
    return report


def regenerate_turns(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Mapping[str, Any]],
    output_path: str | Path,
    **settings: Any,
) -> list[RegenerationReport]:
    """`regenerate` for rows with `turns`: all first turns, then all second turns, and so on, answers fed back.

    Turn 0 goes to `answers.0.jsonl` if `output_path` is `answers.jsonl`, turn 1 to `answers.1.jsonl`; all of them are
    training data. The same call resumes an interrupted one. `settings` are those of `regenerate`.

    Returns:
        The report of every turn.

    Raises:
        ValueError: a row is neither a prompt nor a conversation; or see `regenerate`.
    """
    output_path = Path(output_path)
    going_on = list(rows)
    for index, row in enumerate(going_on):
        try:
            count_turns(row)
        except ValueError as error:
            raise ValueError(f"Row {index}: {error}") from error
    answers: dict[Any, list[str]] = {row["id"]: [] for row in going_on}
    reports: list[RegenerationReport] = []
    while prompts := [prompt for row in going_on if (prompt := next_prompt(row, answers[row["id"]]))]:
        path = output_path.with_name(f"{output_path.stem}.{len(reports)}{output_path.suffix}")
        reports.append(regenerate(target, tokenizer, prompts, path, **settings))
        answered = {row["id"]: row for row in load_jsonl(path)}
        still_going = []
        for row in going_on:
            prompt = next_prompt(row, answers[row["id"]])
            answer_row = answered.get(prompt["id"]) if prompt else None  # none for a prompt that was too long
            if answer_row is not None and not is_over(answer_row):
                answers[row["id"]].append(answer_row["answer"])
                still_going.append(row)
        going_on = still_going
    return reports


def generation_settings(target: PreTrainedModel) -> dict[str, Any]:
    """What a target's `generation_config` sets besides what every call says for itself; JSON."""
    settings = {
        name: value
        for name, value in target.generation_config.to_diff_dict().items()
        if name not in ("do_sample", "temperature", "max_length", "max_new_tokens", "use_cache")
        and name not in ("transformers_version", "_from_model_config")  # saving and loading set them
        and value is not False  # as when not set
    }
    return json.loads(json.dumps(settings, default=str))  # as it comes back from a file


def _check_settings(
    target: PreTrainedModel,
    output_path: Path,
    max_new_tokens: int,
    batch_size: int,
    max_prompt_length: int,
    temperatures: Sequence[float],
) -> None:
    if target.training:
        raise ValueError("The target is in training mode, so dropout would change its answers: call target.eval().")
    check_target(target, ConFuConfig.from_target(target.config))
    if output_path.suffix != ".jsonl":
        raise ValueError(f"The output is {output_path}, expected a .jsonl file; compress it when it is complete.")
    for name, value in (
        ("max_new_tokens", max_new_tokens),
        ("batch_size", batch_size),
        ("max_prompt_length", max_prompt_length),
    ):
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1.")
    if not temperatures or min(temperatures) < 0:
        raise ValueError(f"temperatures is {list(temperatures)}, expected one or more numbers of 0 or above.")
    context = getattr(target.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and max_prompt_length + max_new_tokens > context:
        raise ValueError(
            f"Prompts of up to {max_prompt_length} tokens and answers of up to {max_new_tokens} exceed the target's "
            f"context of {context} tokens: lower max_prompt_length or max_new_tokens."
        )


def _encode_prompts(rows: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[_Prompt]:
    prompts = []
    seen = set()
    for index, row in enumerate(rows):
        identity, prompt = row.get("id"), row.get("prompt")
        if not isinstance(identity, str | int) or prompt is None:
            raise ValueError(f"Prompt {index} has the fields {sorted(row)}, expected an 'id' and a 'prompt'.")
        if identity in seen:
            raise ValueError(f"Prompt {index} has the id {identity!r} of an earlier prompt: make the ids unique.")
        seen.add(identity)
        try:
            input_ids = encode_prompt(prompt, tokenizer, *(row.get(name) for name in TEMPLATE_FIELDS))
        except ValueError as error:
            raise ValueError(f"Prompt {index} (id {identity!r}): {error}") from error
        template = {name: row[name] for name in TEMPLATE_FIELDS if row.get(name) is not None}
        prompts.append(_Prompt(identity, prompt, input_ids, template))
    return prompts


def _plan(prompts: list[_Prompt], temperatures: Sequence[float], seed: int) -> list[_Planned]:
    """All requests of a complete run, whatever is answered already."""
    planned = []
    for number, prompt in enumerate(sorted(prompts, key=lambda prompt: -len(prompt.input_ids))):
        temperature = float(temperatures[number % len(temperatures)])
        content = json.dumps([seed, temperature, prompt.id, prompt.input_ids])
        own_seed = int.from_bytes(hashlib.sha256(content.encode()).digest()[:7], "big")
        planned.append(_Planned(prompt.input_ids, temperature, own_seed, prompt=prompt))
    return planned


def _resume(path: Path, requests: list[_Planned], max_new_tokens: int, made_with: Mapping[str, Any]) -> set[str | int]:
    """Ids answered in `path`. A last line without its line break, left by a stopped writer, is cut off."""
    planned: dict[Any, tuple[Any, ...]] = {
        request.prompt.id: (request.prompt.prompt, request.temperature, request.prompt.template)
        for request in requests
    }
    answered: set[str | int] = set()
    unmarked = 0
    with open(path, "r+b") as file:
        lines = file.readlines()
        whole = [line for line in lines if line.endswith(b"\n")]
        for number, line in enumerate(whole, start=1):
            row = parse_json_object(line, path, number)
            length = len(row.get("answer_ids", ()))
            complete = length <= max_new_tokens if row.get("finished") else length == max_new_tokens
            template = {name: row[name] for name in TEMPLATE_FIELDS if name in row}
            known = planned.get(row.get("id")) == (row.get("prompt"), row.get("temperature"), template)
            if not (known and complete) or row["id"] in answered:
                raise ValueError(
                    f"{path}, line {number} is no answer (id {row.get('id')!r}) that this call would write: repeat "
                    f"the earlier call with its prompts and settings, or choose another output."
                )
            unmarked += not check_made_with(row, made_with, path, number)
            answered.add(row["id"])
        # Only now is it sure that the file is an output of this call and nobody else's.
        if len(whole) < len(lines):
            file.truncate(sum(len(line) for line in whole))
            logger.warning("Removed a torn last line of %d bytes from %s.", len(lines[-1]), path)
    warn_of_unmarked(path, unmarked)
    return answered


def check_made_with(answer: Mapping[str, Any], made_with: Mapping[str, Any], path: Path, number: int) -> bool:
    """Refuses an answer that another call made; `path` and `number` (its line) go into the ValueError.

    Returns:
        False for an answer of an older version, which does not say what it was made with.
    """
    found = answer.get("made_with")
    if found is None:
        return False
    changed = [
        f"{name} was {found.get(name)!r}, is {made_with.get(name)!r}"
        for name in sorted({*found, *made_with})
        if found.get(name) != made_with.get(name)
    ]
    if changed:
        raise ValueError(
            f"{path}, line {number} was made with other settings ({'; '.join(changed)}): repeat the earlier call with "
            f"its target and settings, or choose another output."
        )
    return True


def warn_of_unmarked(path: Path, unmarked: int) -> None:
    if unmarked:
        logger.warning(
            "%s holds %d answers of an older version, which do not say what they were made with: they are taken to be "
            "of the same target and seed.",
            path,
            unmarked,
        )


@dataclass
class RegenerationArguments:
    """Arguments of the command line."""

    target: str = field(metadata={"help": "Model id or folder of the target, or 'demo' for a small public model."})
    prompts: str = field(
        metadata={"help": "JSONL file (also .gz) or Hub dataset of rows with 'id' and 'prompt', or 'turns'."}
    )
    output: str = field(
        metadata={
            "help": "JSONL file of the answers; a run that was interrupted is resumed. With 'turns' one file for each "
            "turn, answers.0.jsonl and so on."
        }
    )
    max_new_tokens: int = field(default=512, metadata={"help": "Longest answer, in tokens."})
    batch_size: int = field(default=64, metadata={"help": "Prompts answered at once."})
    max_prompt_length: int = field(default=1024, metadata={"help": "Longer prompts (in tokens) are skipped."})
    temperatures: list[float] = field(
        default_factory=lambda: [0.0, 0.8], metadata={"help": "Temperatures the prompts take in turn; 0 is greedy."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the sampling."})
    dtype: str = field(
        default_factory=default_dtype,
        metadata={"help": "Data type of the target; bfloat16 where the hardware computes in it."},
    )
    device: str = field(default_factory=default_device, metadata={"help": "Device of the target."})


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `regenerate` from the command line; `argv` defaults to the process's arguments."""
    (arguments,) = HfArgumentParser(RegenerationArguments).parse_args_into_dataclasses(args=argv)
    prompts = list(load_rows(arguments.prompts))
    target, tokenizer = load_target(arguments.target, arguments.dtype, arguments.device)
    settings = {
        name: getattr(arguments, name)
        for name in ("max_new_tokens", "batch_size", "max_prompt_length", "temperatures", "seed")
    }
    if any(row.get("turns") is not None for row in prompts):
        for turn, report in enumerate(regenerate_turns(target, tokenizer, prompts, arguments.output, **settings)):
            print(f"turn {turn}: {report}")
    else:
        print(regenerate(target, tokenizer, prompts, arguments.output, **settings))
