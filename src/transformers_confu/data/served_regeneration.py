"""
On-policy answers through a server that speaks OpenAI's completions protocol, such as vLLM or SGLang.

    vllm serve Qwen/Qwen3-4B
    confu data serve-regenerate --server http://localhost:8000/v1 \
        --tokenizer Qwen/Qwen3-4B --prompts prompts.jsonl --output answers.jsonl

Prompts are rendered here, by the chat template that training uses, and sent as token ids to `/completions`. Token ids
come back where the server knows `return_token_ids` (vLLM from 0.10.2 on, recent SGLang); the text of other servers is
tokenised again, which may differ from the tokens the target chose, so such rows say `"retokenized": true`.
"""

import asyncio
import hashlib
import json
import os
import random
import time
from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from tqdm.auto import tqdm
from transformers import HfArgumentParser, PreTrainedTokenizerBase
from transformers.utils import logging

from ..common.jsonl import JsonLines
from ..common.loading import load_tokenizer
from ..common.option_files import json_option
from .answers import (
    AnswerArguments,
    Conversation,
    RegenerationReport,
    check_output,
    find_answered,
    plan_conversations,
)
from .rows import load_rows


logger = logging.get_logger(__name__)

# Seconds before the first retry; doubled for each further one.
_FIRST_WAIT = 1.0
_LONGEST_WAIT = 60.0
# So many refused prompts before any answer mean that the requests are wrong, not the prompts.
_REFUSALS_AT_START = 10


def regenerate_served(
    server: str,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Mapping[str, Any]],
    output_path: str | Path,
    *,
    max_new_tokens: int,
    max_prompt_length: int,
    model: str | None = None,
    temperatures: Sequence[float] = (0.0, 0.8),
    seed: int = 0,
    concurrency: int = 64,
    timeout: float = 600.0,
    max_retries: int = 8,
    api_key: str | None = None,
    extra_body: Mapping[str, Any] | None = None,
) -> RegenerationReport:
    """
    Let a served target answer prompts, and append each conversation to a JSONL file when it is answered.

    Rows are those of `regenerate`, but that `made_with` holds the model's name on the server and `extra_body`, and
    that `retokenized` is there if ids were made from text. Prompts take the temperatures in turn, each with a seed of
    its own; other settings are the server's defaults unless `extra_body` says otherwise. The same call resumes an
    interrupted one. Rows stand in the order in which they were answered.

    Args:
        server: Base URL, such as `http://localhost:8000/v1`.
        tokenizer: The target's, with a chat template.
        rows: Rows of `id` and `prompt` or `turns`; see [`Conversation`].
        output_path: The `.jsonl` file, created if missing.
        max_new_tokens: Longest answer, in tokens.
        max_prompt_length: Longer prompts (in tokens, template included) are skipped and counted.
        model: Name of the model on the server. None asks the server, which must then serve just one.
        temperatures: One or more; 0 means greedy.
        seed: Of the sampling, as far as the server heeds it.
        concurrency: Requests under way at once.
        timeout: Seconds until a request counts as failed.
        max_retries: How often one request is repeated, with growing waits, while the server is busy (429), fails (5xx)
            or cannot be reached.
        api_key: Sent as bearer token if given.
        extra_body: Further fields of each request, such as `{"top_p": 0.9}`.

    Raises:
        ValueError: a setting or a row is invalid, the server refuses the requests, or the output holds answers that
            this call would not write.
        ConnectionError: the server stayed out of reach; what it answered is in the file.
    """
    path = check_output(
        output_path, max_new_tokens=max_new_tokens, max_prompt_length=max_prompt_length, concurrency=concurrency
    )
    conversations = plan_conversations(rows, temperatures)
    run = _Run(
        server.rstrip("/"),
        tokenizer,
        JsonLines(path),
        RegenerationReport(prompts=len(conversations)),
        max_prompt_length=max_prompt_length,
        max_retries=max_retries,
        request={"max_tokens": max_new_tokens, "return_token_ids": True, "skip_special_tokens": False}
        | dict(extra_body or {}),
        made_with={"model": model, "max_new_tokens": max_new_tokens, "seed": seed}
        | ({"extra_body": dict(extra_body)} if extra_body else {}),
    )
    start = time.perf_counter()
    try:
        _run_to_end(run.answer_all(conversations, concurrency, timeout, api_key))
    finally:
        run.report.seconds = time.perf_counter() - start
    return run.report


def _run_to_end(work: Coroutine[Any, Any, None]) -> None:
    """As `asyncio.run`, and also where a loop runs already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
        return
    loop = asyncio.new_event_loop()
    with ThreadPoolExecutor(max_workers=1) as pool:
        done = pool.submit(loop.run_until_complete, work)
        try:
            done.result()
        except BaseException:
            if not done.done():  # interrupted here, while the thread goes on
                loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(loop)])
            raise
        finally:
            pool.submit(loop.close)


class _Refused(Exception):
    """The server will not answer this request, however often it is sent."""


@dataclass
class _Run:
    """One call: what all of its requests share."""

    server: str
    tokenizer: PreTrainedTokenizerBase
    file: JsonLines
    report: RegenerationReport
    max_prompt_length: int
    max_retries: int
    request: dict[str, Any]
    made_with: dict[str, Any]

    async def answer_all(
        self, conversations: list[Conversation], concurrency: int, timeout: float, api_key: str | None
    ) -> None:
        async with aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=aiohttp.ClientTimeout(total=timeout),
            connector=aiohttp.TCPConnector(limit=concurrency),
        ) as self.session:
            if self.made_with["model"] is None:
                self.made_with["model"] = await self._only_model()
            answered = set(find_answered(self.file, conversations, self.made_with))
            self.report.resumed = len(answered)
            waiting = iter([conversation for conversation in conversations if conversation.id not in answered])
            with tqdm(
                total=len(conversations), initial=len(answered), unit="answer", desc="Regenerating"
            ) as self.progress:
                # A task takes the next conversation when it is done with one; the first error ends them all.
                try:
                    async with asyncio.TaskGroup() as tasks:
                        for _ in range(min(concurrency, len(conversations))):
                            tasks.create_task(self._work(waiting))
                except ExceptionGroup as errors:
                    raise errors.exceptions[0] from None

    async def _work(self, waiting: Iterator[Conversation]) -> None:
        for conversation in waiting:
            while await self._answer(conversation):
                pass
            if conversation.answer_ids:
                self.file.append([conversation.row(self.made_with)])
                self.report.count(conversation)
            self.progress.update()

    async def _answer(self, conversation: Conversation) -> bool:
        """Answer one turn, if the prompt is not too long and the server does not refuse it; whether to go on."""
        prompt_ids = conversation.next_prompt(self.tokenizer)
        if len(prompt_ids) > self.max_prompt_length:
            self.report.too_long += not conversation.answer_ids
            return False
        digest = hashlib.sha256(json.dumps([self.made_with["seed"], conversation.id, prompt_ids]).encode()).digest()
        body = {
            "model": self.made_with["model"],
            "prompt": prompt_ids,
            "temperature": conversation.temperature,
            "seed": int.from_bytes(digest[:4], "big") >> 1,
            **self.request,
        }
        try:
            reply = await self._request("POST", "/completions", body)
        except _Refused as refusal:
            self.report.refused[str(refusal)] += 1
            if not (self.report.written or self.report.resumed) and (
                self.report.refused.total() >= min(_REFUSALS_AT_START, self.report.prompts)
            ):
                raise ValueError(f"{self.server} refuses the requests: {refusal}") from refusal
            logger.warning("The server refuses prompt %r: %s", conversation.id, refusal)
            return False
        try:
            choice = reply["choices"][0]
            text, is_finished = choice["text"], choice["finish_reason"] == "stop"
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"{self.server}/completions replied {json.dumps(reply):.200}, expected `choices` with `text` and "
                f"`finish_reason` as in OpenAI's completions."
            ) from error
        conversation.is_retokenized |= choice.get("token_ids") is None
        return conversation.add(prompt_ids, self._answer_ids(choice, text, is_finished), is_finished, self.tokenizer)

    def _answer_ids(self, choice: Mapping[str, Any], text: str, is_finished: bool) -> list[int]:
        """Ids of the answer, the token that ended it included."""
        ids = choice.get("token_ids")
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"] if ids is None else list(ids)
        if ids and max(ids) >= len(self.tokenizer):
            raise ValueError(
                f"{self.server} answers with token {max(ids)}, and the tokenizer has {len(self.tokenizer)}: give the "
                f"tokenizer of the served model."
            )
        # Some servers leave the token out that ended the answer. It is named as `stop_reason` (vLLM) or `matched_stop`
        # (SGLang) where it is another one than EOS.
        if is_finished and (not ids or ids[-1] not in self.tokenizer.all_special_ids):
            named = [choice.get(name) for name in ("stop_reason", "matched_stop")]
            end = next((token for token in named if type(token) is int), self.tokenizer.eos_token_id)
            if end is not None and ids[-1:] != [end]:
                ids.append(end)
        return ids

    async def _only_model(self) -> str:
        try:
            reply = await self._request("GET", "/models")
            models = [entry["id"] for entry in reply["data"]]
        except (_Refused, KeyError, TypeError) as error:
            raise ValueError(f"{self.server} does not list its models ({error}): name one with `model`.") from error
        if len(models) != 1:
            raise ValueError(f"{self.server} serves {', '.join(models) or 'no model'}: name one with `model`.")
        return models[0]

    async def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON reply; repeats a request while the server is busy, fails or cannot be reached."""
        problem = ""
        for attempt in range(self.max_retries + 1):
            wait = min(_FIRST_WAIT * 2**attempt, _LONGEST_WAIT) * random.uniform(0.5, 1.0)
            try:
                async with self.session.request(method, self.server + path, json=body) as response:
                    if response.status < 400:
                        return await response.json(content_type=None)
                    problem = f"HTTP {response.status}: {(await response.text())[:300]}"
                    if response.status in (401, 403, 404):
                        raise ValueError(f"{self.server}{path} refuses access or does not exist, {problem}")
                    if response.status not in (408, 429) and response.status < 500:
                        raise _Refused(problem)
                    if (asked := response.headers.get("Retry-After", "")).isdecimal():
                        wait = max(wait, min(float(asked), _LONGEST_WAIT))
            except (aiohttp.ClientError, TimeoutError, json.JSONDecodeError) as error:
                problem = f"{type(error).__name__} {error}".strip()
            if attempt < self.max_retries:
                self.report.retries += 1
                await asyncio.sleep(wait)
        raise ConnectionError(
            f"{self.server}{path} gave no answer in {self.max_retries + 1} attempts ({problem}). Answers so far are "
            f"in the output; repeat the call to go on."
        )


@dataclass(kw_only=True)
class ServedRegenerationArguments(AnswerArguments):
    """Arguments of the command line."""

    server: str = field(metadata={"help": "Base URL of the server, such as http://localhost:8000/v1."})
    tokenizer: str = field(metadata={"help": "Model id or folder of the served model's tokenizer."})
    model: str | None = field(default=None, metadata={"help": "Model's name on the server; asked for if left out."})
    max_new_tokens: int = field(default=1024, metadata={"help": "Longest answer, in tokens."})
    max_prompt_length: int = field(default=2048, metadata={"help": "Longer prompts (in tokens) are skipped."})
    concurrency: int = field(default=64, metadata={"help": "Requests under way at once."})
    timeout: float = field(default=600.0, metadata={"help": "Seconds until a request counts as failed."})
    max_retries: int = field(default=8, metadata={"help": "How often one request is repeated."})
    api_key_variable: str = field(
        default="OPENAI_API_KEY", metadata={"help": "Environment variable that holds the server's key, if it has one."}
    )
    chat_template_kwargs: str | None = field(
        default=None,
        metadata={"help": "Options of the chat template as JSON, for rows without: '{\"enable_thinking\": false}'."},
    )
    extra_body: str | None = field(
        default=None, metadata={"help": "Further fields of each request as JSON, such as '{\"top_p\": 0.9}'."}
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `regenerate_served` from the command line; `argv` defaults to the process's arguments."""
    (arguments,) = HfArgumentParser(ServedRegenerationArguments).parse_args_into_dataclasses(args=argv)
    settings = dict(vars(arguments))
    server, tokenizer, prompts, output = (settings.pop(name) for name in ("server", "tokenizer", "prompts", "output"))
    settings["api_key"] = os.environ.get(settings.pop("api_key_variable"))
    rows: Iterable[Mapping[str, Any]] = load_rows(prompts)
    if options := settings.pop("chat_template_kwargs"):
        options = json_option("chat_template_kwargs", options)
        rows = [{**row, "chat_template_kwargs": row.get("chat_template_kwargs") or options} for row in rows]
    if settings["extra_body"]:
        settings["extra_body"] = json_option("extra_body", settings["extra_body"])
    print(regenerate_served(server, load_tokenizer(tokenizer), rows, output, **settings))
