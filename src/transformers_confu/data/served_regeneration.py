"""
On-policy answers through a server that speaks OpenAI's completions protocol, such as vLLM or SGLang.

    vllm serve Qwen/Qwen3-4B
    confu data serve-regenerate --server http://localhost:8000/v1 \
        --tokenizer Qwen/Qwen3-4B --prompts prompts.jsonl --output answers.jsonl

Prompts are rendered here, by the chat template that training uses, and sent as token ids to `/completions`. Token ids
come back where the server knows `return_token_ids` (vLLM from 0.10.2 on, recent SGLang); the text of other servers is
tokenised again, which may differ from the tokens the target chose, so such rows say `"retokenized": true`.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from threading import Lock
from typing import Any

import urllib3
from tqdm.auto import tqdm
from transformers import HfArgumentParser, PreTrainedTokenizerBase
from transformers.utils import logging

from ..common.loading import load_tokenizer
from ..common.option_files import json_option, option
from .answers import AnswerArguments, AnswerFile, Conversation, RegenerationReport
from .rows import load_rows


logger = logging.get_logger(__name__)

_ATTEMPTS = 9
# The wait before the third attempt is twice this, and doubles from there on.
_WAIT_SECONDS = 1.0
_LONGEST_WAIT_SECONDS = 60.0
_ASK_AGAIN = (408, 429, *range(500, 600))
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
    api_key: str | None = None,
    extra_body: Mapping[str, Any] | None = None,
) -> RegenerationReport:
    """
    Let a served target answer prompts, and append each conversation to a JSONL file when it is answered.

    Rows are those of `regenerate`, in the order in which they were answered, but that `made_with` holds the model's
    name on the server and `extra_body`, and that `retokenized` is there if ids were made from text. Each prompt has a
    seed of its own; other settings are the server's defaults unless `extra_body` says otherwise. The same call resumes
    an interrupted one. What is not named below is as of [`regenerate`].

    Args:
        server: Base URL, such as `http://localhost:8000/v1`.
        model: Name of the model on the server. None asks the server, which must then serve just one.
        concurrency: Requests under way at once.
        timeout: Seconds until a request counts as failed. Failed ones are repeated, with growing waits, as are those
            that find the server busy (429), failing (5xx) or out of reach.
        api_key: Sent as bearer token if given.
        extra_body: Further fields of each request, such as `{"top_p": 0.9}`.

    Raises:
        ConnectionError: the server stayed out of reach; what it answered is in the file.
    """
    client = _Client(server, concurrency, timeout, api_key)
    made_with: dict[str, Any] = {"model": model or client.only_model(), "max_new_tokens": max_new_tokens, "seed": seed}
    if extra_body:
        made_with["extra_body"] = dict(extra_body)
    request = {
        "model": made_with["model"],
        "max_tokens": max_new_tokens,
        "return_token_ids": True,
        "skip_special_tokens": False,
        **(extra_body or {}),
    }
    answers = AnswerFile(output_path, rows, temperatures, made_with)
    report = answers.report
    tokenizer_lock = Lock()  # a fast tokenizer may be set up by one call while another uses it

    def answer(conversation: Conversation) -> tuple[Conversation, str | None]:
        """The conversation, answered as far as it can be, and why the server refuses its next turn if it does."""
        goes_on = True
        while goes_on:
            with tokenizer_lock:
                prompt_ids = conversation.next_prompt(tokenizer)
            if len(prompt_ids) > max_prompt_length:
                break
            digest = hashlib.sha256(json.dumps([seed, conversation.id, prompt_ids]).encode()).digest()
            drawn: dict[str, Any] = {
                "temperature": conversation.temperature,
                "seed": int.from_bytes(digest[:4], "big") >> 1,
            }
            try:
                reply = client.ask("POST", "/completions", {"prompt": prompt_ids, **drawn, **request})
            except _Refused as refusal:
                return conversation, str(refusal)
            with tokenizer_lock:
                goes_on = _add_reply(conversation, prompt_ids, reply, tokenizer, server)
        return conversation, None

    # Threads and no event loop, so that it runs in notebooks too. When this process is stopped they end at once.
    with ThreadPool(concurrency) as pool:
        done = pool.imap_unordered(answer, answers.unanswered)
        for conversation, refusal in tqdm(done, total=len(answers.unanswered), unit="answer", desc="Regenerating"):
            if conversation.answer_ids:
                answers.write([conversation])
            elif refusal is None:
                report.too_long += 1
            if refusal is not None:
                report.refused[refusal] += 1
                nothing_so_far = not (report.written or report.resumed)
                if nothing_so_far and report.refused.total() >= min(_REFUSALS_AT_START, report.prompts):
                    raise ValueError(f"{server} refuses the requests: {refusal}")
                logger.warning("The server refuses prompt %r: %s", conversation.id, refusal)
    return report


class _Refused(Exception):
    """The server will not answer this request, however often it is sent."""


class _Client:
    """Requests to a server, each repeated while the server is busy, fails or cannot be reached."""

    def __init__(self, server: str, concurrency: int, timeout: float, api_key: str | None):
        self.server = server.rstrip("/")
        self.pool = urllib3.PoolManager(
            maxsize=concurrency,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=timeout,
            retries=urllib3.Retry(
                _ATTEMPTS - 1,
                allowed_methods=None,
                status_forcelist=_ASK_AGAIN,
                raise_on_status=False,
                backoff_factor=_WAIT_SECONDS,
                backoff_max=_LONGEST_WAIT_SECONDS,
                backoff_jitter=_WAIT_SECONDS,
            ),
        )

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON of the reply; an error says whether to ask no more (`_Refused`), or what else is wrong."""
        try:
            response = self.pool.request(method, self.server + path, json=body)
            problem = f"HTTP {response.status}: {response.data.decode(errors='replace')[:300]}"
        except urllib3.exceptions.HTTPError as error:
            response, problem = None, str(error)
        if response is None or response.status in _ASK_AGAIN:
            raise ConnectionError(
                f"{self.server}{path} gave no answer in {_ATTEMPTS} attempts ({problem}). Answers so far are in "
                "the output; repeat the call to go on."
            )
        if response.status in (401, 403, 404):
            raise ValueError(f"{self.server}{path} refuses access or does not exist, {problem}")
        if response.status >= 400:
            raise _Refused(problem)
        try:
            return response.json()
        except ValueError as error:
            raise ValueError(f"{self.server}{path} replied with something else than JSON, {problem}") from error

    def only_model(self) -> str:
        try:
            models = [entry["id"] for entry in self.ask("GET", "/models")["data"]]
        except (_Refused, KeyError, TypeError) as error:
            raise ValueError(f"{self.server} does not list its models ({error}): name one with `model`.") from error
        if len(models) != 1:
            raise ValueError(f"{self.server} serves {', '.join(models) or 'no model'}: name one with `model`.")
        return models[0]


def _add_reply(
    conversation: Conversation, prompt_ids: list[int], reply: Any, tokenizer: PreTrainedTokenizerBase, server: str
) -> bool:
    """Take the answer in a server's reply; whether there is a further turn."""
    try:
        choice = reply["choices"][0]
        text, is_finished = choice["text"], choice["finish_reason"] == "stop"
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"{server}/completions replied {json.dumps(reply):.200}, expected `choices` with `text` and "
            f"`finish_reason` as in OpenAI's completions."
        ) from error
    ids = choice.get("token_ids")
    if ids is None:
        conversation.is_retokenized = True
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if ids and max(ids) >= len(tokenizer):
        raise ValueError(
            f"{server} answers with token {max(ids)}, and the tokenizer has {len(tokenizer)}: give the tokenizer of "
            "the served model."
        )
    # Some servers leave the token out that ended the answer. It is named as `stop_reason` (vLLM) or `matched_stop`
    # (SGLang) where it is another one than EOS.
    if is_finished and (not ids or ids[-1] not in tokenizer.all_special_ids):
        named = [choice.get(name) for name in ("stop_reason", "matched_stop")]
        end = next((token for token in named if type(token) is int), tokenizer.eos_token_id)
        if end is not None and ids[-1:] != [end]:
            ids = [*ids, end]
    return conversation.add(prompt_ids, ids, is_finished, tokenizer)


@dataclass(kw_only=True)
class ServedRegenerationArguments(AnswerArguments):
    """Arguments of the command line; a server that asks for a key gets that of the environment, `OPENAI_API_KEY`."""

    server: str = option("Base URL of the server, such as http://localhost:8000/v1.", ...)
    tokenizer: str = option("Model id or folder of the served model's tokenizer.", ...)
    model: str | None = option("Model's name on the server; asked for if left out.")
    max_new_tokens: int = option("Longest answer, in tokens.", 1024)
    max_prompt_length: int = option("Longer prompts (in tokens) are skipped.", 2048)
    concurrency: int = option("Requests under way at once.", 64)
    timeout: float = option("Seconds until a request counts as failed.", 600.0)
    chat_template_kwargs: str | None = option(
        "Options of the chat template as JSON, for rows without: '{\"enable_thinking\": false}'."
    )
    extra_body: str | None = option("Further fields of each request as JSON, such as '{\"top_p\": 0.9}'.")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `regenerate_served` from the command line."""
    (arguments,) = HfArgumentParser(ServedRegenerationArguments).parse_args_into_dataclasses(args=argv)
    settings = dict(vars(arguments))
    server, tokenizer, prompts, output = (settings.pop(name) for name in ("server", "tokenizer", "prompts", "output"))
    settings["api_key"] = os.environ.get("OPENAI_API_KEY")
    rows: Iterable[Mapping[str, Any]] = load_rows(prompts)
    if options := settings.pop("chat_template_kwargs"):
        options = json_option("chat_template_kwargs", options)
        rows = [{**row, "chat_template_kwargs": row.get("chat_template_kwargs") or options} for row in rows]
    if settings["extra_body"]:
        settings["extra_body"] = json_option("extra_body", settings["extra_body"])
    print(regenerate_served(server, load_tokenizer(tokenizer), rows, output, **settings))
