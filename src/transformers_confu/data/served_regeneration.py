"""On-policy answers through a server that speaks OpenAI's completions protocol, such as vLLM or SGLang.

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
from collections import Counter
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import aiohttp
from tqdm.auto import tqdm
from transformers import AutoTokenizer, HfArgumentParser, PreTrainedTokenizerBase
from transformers.utils import logging

from ..common.jsonl import parse_json_object
from ..common.option_files import json_option
from .chat_template import encode_prompt
from .conversations import TEMPLATE_FIELDS, count_turns, is_over, next_prompt
from .regeneration import RegenerationReport, check_made_with, warn_of_unmarked
from .rows import load_rows


logger = logging.get_logger(__name__)

# Seconds before the first retry; doubled for each further one.
_FIRST_WAIT = 1.0
_LONGEST_WAIT = 60.0
# So many refused prompts before any answer mean that the requests are wrong, not the prompts.
_REFUSALS_AT_START = 10


@dataclass
class ServedRegenerationReport(RegenerationReport):
    """What one call of `regenerate_served` did, beside what `RegenerationReport` holds.

    Attributes:
        retokenized: answers among the written ones whose ids were made from text.
        stopped: conversations that ended before their last turn, behind an answer that was cut or empty.
        retries: requests repeated after a busy, failing or unreachable server.
        refused: number of prompts that the server refused, by its reason.
    """

    retokenized: int = 0
    stopped: int = 0
    retries: int = 0
    refused: Counter = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [super().__str__()]
        if self.retokenized:
            lines.append(
                f"answers whose ids were made from text, since the server returns none: {self.retokenized:,}; their "
                f"tokens may differ from those the target chose"
            )
        if self.stopped:
            lines.append(f"conversations ended early, behind a cut or empty answer: {self.stopped:,}")
        lines += [f"prompts refused ({reason}): {number:,}" for reason, number in self.refused.items()]
        if self.retries:
            lines.append(f"requests repeated: {self.retries:,}")
        return "\n".join(lines)


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
) -> ServedRegenerationReport:
    """Lets a served target answer prompts and appends the answers to a JSONL file as they arrive.

    A row is `{id, prompt, answer, answer_ids, temperature, finished, made_with}` as `regenerate` writes it, but that
    `made_with` holds the model's name on the server, the seed and `extra_body`; `tools` and `chat_template_kwargs` of
    its prompt are handed on, and `retokenized` is there if the ids were made from text. `prepare_dataset` takes these
    rows as they are. Rows with `turns` are answered turn by turn, see `next_prompt`.

    Prompts take the temperatures in turn, each with a seed of its own; other settings are the server's defaults unless
    `extra_body` says otherwise. The same call resumes an interrupted one: a torn last line is removed, answered turns
    are skipped. Answers stand in the order in which they came.

    Args:
        server: base URL, such as `http://localhost:8000/v1`.
        tokenizer: the target's, with a chat template.
        rows: prompts, `{"id", "prompt"}`, or conversations, `{"id", "turns"}`; ids are unique.
        output_path: the `.jsonl` file, created if missing.
        max_new_tokens: longest answer, in tokens.
        max_prompt_length: longer prompts (in tokens, template included) are skipped and counted.
        model: name of the model on the server. None asks the server, which must then serve just one.
        temperatures: one or more; 0 means greedy.
        seed: seed of the sampling, as far as the server heeds it.
        concurrency: requests under way at once.
        timeout: seconds until a request counts as failed.
        max_retries: how often one request is repeated, with growing waits, while the server is busy (429), fails (5xx)
            or cannot be reached.
        api_key: sent as bearer token if given.
        extra_body: further fields of each request, such as `{"top_p": 0.9}`.

    Raises:
        ValueError: a setting or a row is invalid, the server refuses the requests, or the output holds answers of
            another model, of other rows, or of another seed, temperature, length or `extra_body`.
        ConnectionError: the server stayed out of reach; what it answered is in the file.
    """
    output_path = Path(output_path)
    if output_path.suffix != ".jsonl":
        raise ValueError(f"output_path is {output_path}, expected a .jsonl file: answers are appended as they arrive.")
    for name, value in (
        ("max_new_tokens", max_new_tokens),
        ("max_prompt_length", max_prompt_length),
        ("concurrency", concurrency),
    ):
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1.")
    if not temperatures or min(temperatures) < 0:
        raise ValueError(f"temperatures is {temperatures}, expected one or more, none negative.")
    conversations = _conversations(rows, temperatures)
    report = ServedRegenerationReport(prompts=sum(conversation.turns for conversation in conversations))
    made_with: dict[str, Any] = {"model": model, "seed": seed}
    if extra_body:
        made_with["extra_body"] = json.loads(json.dumps(dict(extra_body)))  # as it comes back from a file
    if output_path.exists():
        report.resumed = _resume(output_path, conversations, max_new_tokens, made_with)
    output_path.parent.mkdir(parents=True, exist_ok=True)
    with open(output_path, "a", encoding="utf-8") as file:
        run = _Run(
            server.rstrip("/"),
            tokenizer,
            file,
            report,
            max_new_tokens=max_new_tokens,
            max_prompt_length=max_prompt_length,
            model=model,
            made_with=made_with,
            seed=seed,
            max_retries=max_retries,
            extra_body=dict(extra_body or {}),
        )
        start = time.perf_counter()
        try:
            _run_to_end(run.answer_all(conversations, concurrency, timeout, api_key))
        finally:
            report.seconds = time.perf_counter() - start
    if report.retokenized:
        logger.warning(
            "%s returns no token ids: %d answers were tokenised from their text.", server, report.retokenized
        )
    return report


def _run_to_end(work: Coroutine[Any, Any, None]) -> None:
    """As `asyncio.run`, and also where a loop runs already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
        return
    loop = asyncio.new_event_loop()

    def run() -> None:
        try:
            loop.run_until_complete(work)
        finally:
            loop.close()

    with ThreadPoolExecutor(max_workers=1) as pool:
        done = pool.submit(run)
        try:
            done.result()
        except BaseException:
            if not done.done():  # interrupted here, while the thread goes on
                loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(loop)])
            raise


class _Conversation:
    """A row and how far it is answered."""

    def __init__(self, row: Mapping[str, Any], temperature: float) -> None:
        self.row = row
        self.temperature = temperature
        self.turns = count_turns(row)
        self.answers: list[str] = []
        self.is_over = False

    def next_prompt(self) -> dict[str, Any] | None:
        return None if self.is_over else next_prompt(self.row, self.answers)

    def add(self, answer: Mapping[str, Any]) -> None:
        self.answers.append(answer["answer"])
        self.is_over = is_over(answer) or len(self.answers) == self.turns


def _conversations(rows: Iterable[Mapping[str, Any]], temperatures: Sequence[float]) -> list[_Conversation]:
    conversations, ids = [], set()
    for index, row in enumerate(rows):
        try:
            conversation = _Conversation(row, float(temperatures[index % len(temperatures)]))
        except ValueError as error:
            raise ValueError(f"Row {index}: {error}") from error
        if row["id"] in ids:
            raise ValueError(f"Row {index} has the id {row['id']!r} of an earlier one, expected unique ids.")
        ids.add(row["id"])
        conversations.append(conversation)
    return conversations


def _resume(path: Path, conversations: list[_Conversation], max_new_tokens: int, made_with: dict[str, Any]) -> int:
    """Advances the conversations by the answers in `path`; a torn last line is cut off. Returns their number.

    A model that `made_with` does not name is from here on that of the answers.
    """
    unmarked = 0
    waiting = {prompt["id"]: conversation for conversation in conversations if (prompt := conversation.next_prompt())}
    with open(path, "r+b") as file:
        lines = file.readlines()
        whole = [line for line in lines if line.endswith(b"\n")]
        for number, line in enumerate(whole, start=1):
            answer = parse_json_object(line, path, number)
            conversation = waiting.pop(answer.get("id"), None)
            prompt = conversation.next_prompt() if conversation else None
            length = len(answer.get("answer_ids", ()))
            is_whole = answer.get("finished") or answer.get("retokenized") or length == max_new_tokens
            is_known = prompt is not None and prompt == {key: answer[key] for key in prompt if key in answer}
            if not (
                is_known
                and answer.get("temperature") == conversation.temperature
                and is_whole
                and (length <= max_new_tokens or answer.get("retokenized"))
            ):
                raise ValueError(
                    f"{path}, line {number} is no answer (id {answer.get('id')!r}) that this call would write: repeat "
                    f"the earlier call with its prompts and settings, or choose another output."
                )
            made_with["model"] = made_with["model"] or (answer.get("made_with") or {}).get("model")
            unmarked += not check_made_with(answer, made_with, path, number)
            conversation.add(answer)
            if following := conversation.next_prompt():
                waiting[following["id"]] = conversation
        # Only now is it sure that the file is an output of this call and nobody else's.
        if len(whole) < len(lines):
            file.truncate(sum(len(line) for line in whole))
            logger.warning("Removed a torn last line of %d bytes from %s.", len(lines[-1]), path)
    warn_of_unmarked(path, unmarked)
    return len(whole)


class _Refused(Exception):
    """The server will not answer this request, however often it is sent."""


@dataclass
class _Run:
    server: str
    tokenizer: PreTrainedTokenizerBase
    file: IO[str]
    report: ServedRegenerationReport
    max_new_tokens: int
    max_prompt_length: int
    model: str | None
    made_with: dict[str, Any]
    seed: int
    max_retries: int
    extra_body: dict[str, Any]

    async def answer_all(
        self, conversations: list[_Conversation], concurrency: int, timeout: float, api_key: str | None
    ) -> None:
        pending = [conversation for conversation in conversations if conversation.next_prompt()]
        if not pending:
            return
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        async with aiohttp.ClientSession(
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=timeout),
            connector=aiohttp.TCPConnector(limit=concurrency),
        ) as self.session:
            self.model = self.model or await self._only_model()
            if self.made_with["model"] not in (None, self.model):
                raise ValueError(
                    f"{self.file.name} holds answers of {self.made_with['model']}, and {self.server} serves "
                    f"{self.model}: serve the earlier model, or choose another output."
                )
            self.made_with["model"] = self.model
            waiting = iter(pending)
            with tqdm(
                total=self.report.prompts, initial=self.report.resumed, unit="answer", desc="Regenerating"
            ) as self.progress:
                # A task takes the next conversation when it is done with one; the first error ends them all.
                try:
                    async with asyncio.TaskGroup() as tasks:
                        for _ in range(min(concurrency, len(pending))):
                            tasks.create_task(self._work(waiting))
                except ExceptionGroup as errors:
                    raise errors.exceptions[0] from None

    async def _work(self, waiting: Iterable[_Conversation]) -> None:
        for conversation in waiting:
            while prompt := conversation.next_prompt():
                answer = await self._answer(prompt, conversation.temperature)
                if answer is None:
                    conversation.is_over = True
                    break
                self.file.write(json.dumps(answer, ensure_ascii=False) + "\n")
                self.file.flush()
                conversation.add(answer)
                self.report.written += 1
                self.report.tokens += len(answer["answer_ids"])
                self.report.unfinished += not answer["finished"]
                self.report.retokenized += "retokenized" in answer
                self.progress.update()
            else:
                self.report.stopped += len(conversation.answers) < conversation.turns
            self.progress.update(conversation.turns - len(conversation.answers))

    async def _answer(self, prompt: dict[str, Any], temperature: float) -> dict[str, Any] | None:
        """The answer row, or None for a prompt that is too long or refused."""
        template = [prompt.get(name) for name in TEMPLATE_FIELDS]
        try:
            prompt_ids = encode_prompt(prompt["prompt"], self.tokenizer, *template)
        except ValueError as error:
            raise ValueError(f"Prompt {prompt['id']!r}: {error}") from error
        if len(prompt_ids) > self.max_prompt_length:
            self.report.too_long += 1
            return None
        digest = hashlib.sha256(json.dumps([self.seed, prompt["id"]]).encode()).digest()
        body = {
            "model": self.model,
            "prompt": prompt_ids,
            "max_tokens": self.max_new_tokens,
            "temperature": temperature,
            "seed": int.from_bytes(digest[:4], "big") >> 1,
            "return_token_ids": True,
            "skip_special_tokens": False,
            **self.extra_body,
        }
        try:
            reply = await self._request("POST", "/completions", body)
        except _Refused as refusal:
            self.report.refused[str(refusal)] += 1
            if not (self.report.written or self.report.resumed) and (
                self.report.refused.total() >= min(_REFUSALS_AT_START, self.report.prompts)
            ):
                raise ValueError(f"{self.server} refuses the requests: {refusal}") from refusal
            logger.warning("The server refuses prompt %r: %s", prompt["id"], refusal)
            return None
        try:
            choice = reply["choices"][0]
            text, finish_reason = choice["text"], choice["finish_reason"]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"{self.server}/completions replied {json.dumps(reply):.200}, expected `choices` with `text` and "
                f"`finish_reason` as in OpenAI's completions."
            ) from error
        answer_ids, is_retokenized = self._answer_ids(choice, text, finish_reason == "stop")
        row = {
            "id": prompt["id"],
            "prompt": prompt["prompt"],
            "answer": self.tokenizer.decode(answer_ids, skip_special_tokens=True),
            "answer_ids": answer_ids,
            "temperature": temperature,
            "finished": finish_reason == "stop",
            "made_with": self.made_with,
        }
        row |= {name: prompt[name] for name in TEMPLATE_FIELDS if name in prompt}
        return row | {"retokenized": True} if is_retokenized else row

    def _answer_ids(self, choice: Mapping[str, Any], text: str, is_finished: bool) -> tuple[list[int], bool]:
        """Ids of the answer, the token that ended it included, and whether they were made from text."""
        token_ids = choice.get("token_ids")
        is_retokenized = token_ids is None
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"] if is_retokenized else list(token_ids)
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
        return ids, is_retokenized

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


@dataclass
class ServedRegenerationArguments:
    """Arguments of the command line."""

    server: str = field(metadata={"help": "Base URL of the server, such as http://localhost:8000/v1."})
    tokenizer: str = field(metadata={"help": "Model id or folder of the served model's tokenizer."})
    prompts: str = field(
        metadata={"help": "Prompts: a JSONL file or a Hub dataset, rows with 'id' and 'prompt' or 'turns'."}
    )
    output: str = field(metadata={"help": "JSONL file of the answers; a run that was interrupted is resumed."})
    model: str | None = field(default=None, metadata={"help": "Model's name on the server; asked for if left out."})
    max_new_tokens: int = field(default=1024, metadata={"help": "Longest answer, in tokens."})
    max_prompt_length: int = field(default=2048, metadata={"help": "Longer prompts (in tokens) are skipped."})
    temperatures: list[float] = field(
        default_factory=lambda: [0.0, 0.8], metadata={"help": "Temperatures the prompts take in turn; 0 is greedy."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the sampling."})
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
    rows: Iterable[Mapping[str, Any]] = load_rows(arguments.prompts)
    if arguments.chat_template_kwargs:
        options = json_option("chat_template_kwargs", arguments.chat_template_kwargs)
        rows = [{**row, "chat_template_kwargs": row.get("chat_template_kwargs") or options} for row in rows]
    report = regenerate_served(
        arguments.server,
        AutoTokenizer.from_pretrained(arguments.tokenizer),
        rows,
        arguments.output,
        max_new_tokens=arguments.max_new_tokens,
        max_prompt_length=arguments.max_prompt_length,
        model=arguments.model,
        temperatures=arguments.temperatures,
        seed=arguments.seed,
        concurrency=arguments.concurrency,
        timeout=arguments.timeout,
        max_retries=arguments.max_retries,
        api_key=os.environ.get(arguments.api_key_variable),
        extra_body=json_option("extra_body", arguments.extra_body) if arguments.extra_body else None,
    )
    print(report)
