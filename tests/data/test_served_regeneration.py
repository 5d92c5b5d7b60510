"""Answers through a stand-in server on this machine against `regenerate`, and under all that a server can do wrong."""

import asyncio
import json
import signal
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from transformers_confu.common.jsonl import read_jsonl
from transformers_confu.data import served_regeneration
from transformers_confu.data.chat_template import encode_prompt
from transformers_confu.data.dataset import prepare_dataset
from transformers_confu.data.regeneration import regenerate
from transformers_confu.data.served_regeneration import regenerate_served


SETTINGS = {"max_new_tokens": 10, "max_prompt_length": 40}
YES = {"text": "w1", "finish_reason": "stop", "token_ids": [7, 1]}


@pytest.fixture
def prompts():
    """Single prompts and conversations, one of which has a turn that is too long."""
    single = [
        {"id": index, "prompt": " ".join(f"w{(index * 5 + word) % 26}" for word in range(3))} for index in range(5)
    ]
    turns = [["w1", "w2 w3", "w4"], ["w5", "w6 " * 50], ["w0", "w5", "w6"], ["w2", "w2"], ["w3", "w5"]]
    return single + [{"id": f"c{index}", "turns": said, "system": "w9"} for index, said in enumerate(turns)]


class StandIn:
    """Answers completions with `complete(body)`: a choice, or (status, headers, text); a status of 0 hangs up."""

    def __init__(self, complete, models=("tiny",)):
        self.complete, self.models = complete, models
        self.bodies, self.headers = [], []

    def reply(self, path, headers, body):
        if path == "/v1/models":
            return 200, {}, json.dumps({"data": [{"id": model} for model in self.models]})
        if path != "/v1/completions":
            return 404, {}, "no such path"
        self.bodies.append(body)
        self.headers.append(headers)
        choice = self.complete(body)
        return choice if isinstance(choice, tuple) else (200, {}, json.dumps({"choices": [choice]}))


@contextmanager
def serve(stand_in: StandIn):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, headers, text = stand_in.reply(self.path, dict(self.headers), json.loads(body or "null"))
            if not status:
                self.close_connection = True
                return
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(text.encode()))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())

        do_POST = do_GET

        def log_message(self, *args):
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 64  # more connections at once than the usual 5 would wait for a second

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)


@pytest.fixture
def ask(tokenizer, tmp_path, monkeypatch):
    """Calls `regenerate_served` with a stand-in for the server; its report, and the rows of the output by their id."""
    monkeypatch.setattr(served_regeneration, "_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(served_regeneration, "_ATTEMPTS", 4)

    def call(complete, rows, *, file="a.jsonl", **settings):
        with serve(complete if isinstance(complete, StandIn) else StandIn(complete)) as url:
            report = regenerate_served(url, tokenizer, rows, tmp_path / file, **SETTINGS | settings)
        return report, {row["id"]: row for row in read_jsonl(tmp_path / file)}

    return call


def answer_with(target, tokenizer, with_ids=True, with_end=True):
    """The tiny target behind the protocol: greedy at temperature 0, else sampled by the request's seed."""
    lock = threading.Lock()

    def complete(body):
        sampling = {"do_sample": True, "temperature": body["temperature"]} if body["temperature"] else {}
        prompt = torch.tensor([body["prompt"]])
        with lock, torch.random.fork_rng(devices=[]):
            torch.manual_seed(body["seed"])
            ids = target.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=body["max_tokens"],
                pad_token_id=0,
                **sampling,
            )
        ids = ids[0, prompt.shape[1] :].tolist()
        ends = ids[-1] in target.generation_config.eos_token_id
        if ends and ids[-1] != 1:  # as if it were the one end-of-text token
            ids[-1] = 1
        choice = {
            "text": tokenizer.decode(ids[:-1] if ends else ids, skip_special_tokens=body["skip_special_tokens"]),
            "finish_reason": "stop" if ends else "length",
            "stop_reason": None,
        }
        return choice | ({"token_ids": ids if with_end or not ends else ids[:-1]} if with_ids else {})

    return complete


@pytest.mark.parametrize("form", ["ids", "ids without end", "text"])
def test_greedy_answers_are_those_of_regenerate(target, tokenizer, prompts, tmp_path, ask, form):
    regenerate(target, tokenizer, prompts, tmp_path / "local.jsonl", batch_size=4, temperatures=(0.0,), **SETTINGS)
    expected = {row["id"]: row for row in read_jsonl(tmp_path / "local.jsonl")}
    for row in expected.values():
        row["made_with"] = {"model": "tiny", "max_new_tokens": 10, "seed": 0}
        for ids in row["answer_ids"]:
            ids[-1] = 1 if ids[-1] in (9, 11) else ids[-1]
    complete = answer_with(target, tokenizer, with_ids=form != "text", with_end=form == "ids")
    report, rows = ask(complete, prompts, temperatures=(0.0,))
    assert {row.pop("retokenized", False) for row in rows.values()} == {form == "text"}
    assert rows == expected
    assert report.retokenized == (10 if form == "text" else 0)
    assert {row["finished"] for row in rows.values()} == {True, False}
    assert {len(row["answer_ids"]) for row in rows.values()} >= {1, 2}
    assert (report.written, report.unfinished) == (10, sum(not row["finished"] for row in rows.values()))
    assert report.stopped == sum(
        len(rows[prompt["id"]]["answer_ids"]) < len(prompt.get("turns", "1")) for prompt in prompts
    )
    dataset = prepare_dataset(rows.values(), tokenizer, 200)
    learned = sorted(label for row in dataset for label in row["labels"] if label != -100)
    assert learned == sorted(token for row in rows.values() for ids in row["answer_ids"] for token in ids)


def test_it_runs_in_a_notebook_and_is_interrupted_at_once(prompts, ask):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins without one
    under_way, answered = threading.Semaphore(0), threading.Event()

    def complete(body):
        under_way.release()
        answered.wait(timeout=30)
        return YES

    def interrupt():
        for _ in range(3):
            assert under_way.acquire(timeout=30)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    async def cell():  # a notebook's code runs within an event loop
        return ask(complete, prompts)

    threading.Thread(target=interrupt).start()
    stand_in = StandIn(complete)
    with pytest.raises(KeyboardInterrupt):
        ask(stand_in, prompts, concurrency=3)
    assert not answered.is_set() and len(stand_in.bodies) == 3  # they are still under way
    answered.set()
    assert asyncio.run(cell())[0].written == 10


def test_requests_say_what_was_asked_for(tokenizer, prompts, ask):
    stand_in = StandIn(lambda body: YES, models=("a", "b"))
    prompts = [{**prompt, "chat_template_kwargs": {"tone": "w9"}} for prompt in prompts[:4]]
    _, rows = ask(stand_in, prompts, model="b", seed=3, api_key="key", extra_body={"top_p": 0.5})
    bodies = {tuple(body["prompt"]): body for body in stand_in.bodies}
    for index, prompt in enumerate(prompts):
        body = bodies[tuple(encode_prompt(prompt["prompt"], tokenizer, None, {"tone": "w9"}))]
        assert body["temperature"] == (0.0, 0.8)[index % 2]
        assert (body["model"], body["max_tokens"], body["top_p"], body["return_token_ids"]) == ("b", 10, 0.5, True)
    assert len({body["seed"] for body in stand_in.bodies}) == 4
    assert all(headers["Authorization"] == "Bearer key" for headers in stand_in.headers)
    assert all(row["chat_template_kwargs"] == {"tone": "w9"} for row in rows.values())


def test_an_interrupted_run_is_resumed_and_that_of_another_model_refused(target, tokenizer, prompts, tmp_path, ask):
    complete = answer_with(target, tokenizer)
    _, whole = ask(complete, prompts, model="tiny", extra_body={"top_p": 0.5})
    written = (tmp_path / "a.jsonl").read_bytes()
    lines = written.splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines[:5]) + lines[5][:-4])
    with pytest.raises(ValueError, match=r"\(extra_body was .*, is None; model was 'tiny', is 'other'\)"):
        ask(StandIn(complete, ("other",)), prompts)
    report, rows = ask(complete, prompts, extra_body={"top_p": 0.5})
    assert (report.resumed, report.written) == (5, 5) and rows == whole


def test_busy_failing_and_vanishing_servers_are_asked_again(prompts, ask):
    troubles = iter([(429, {"Retry-After": "0"}, "busy"), (503, {}, "loading"), (0, {}, "")])
    report, _ = ask(lambda body: next(troubles, YES), prompts[:3], concurrency=1)
    assert report.written == 3 and next(troubles, None) is None


def test_a_server_that_stays_away_ends_the_run_with_its_answers_kept(tokenizer, prompts, tmp_path, ask):
    replies = iter([YES, YES])
    with pytest.raises(ConnectionError, match=r"no answer in 4 attempts \(HTTP 500: no memory\).*repeat the call"):
        ask(lambda body: next(replies, (500, {}, "no memory")), prompts, concurrency=1)
    assert len(list(read_jsonl(tmp_path / "a.jsonl"))) == 2
    with pytest.raises(ConnectionError, match=r"no answer in 4 attempts \(.*refused"):
        regenerate_served("http://127.0.0.1:9", tokenizer, prompts, tmp_path / "b.jsonl", **SETTINGS)


def test_refused_prompts_are_counted(tokenizer, prompts, ask):
    refused = encode_prompt(prompts[2]["prompt"], tokenizer)
    report, _ = ask(lambda body: (400, {}, "too long") if body["prompt"] == refused else YES, prompts)
    assert (report.written, dict(report.refused)) == (9, {"HTTP 400: too long": 1})
    assert "prompts refused (HTTP 400: too long): 1" in str(report)


@pytest.mark.parametrize(
    ("reply", "settings", "message"),
    [
        ((400, {}, "no field prompt"), {}, "refuses the requests: HTTP 400: no field prompt"),
        ((401, {}, "no key"), {}, "refuses access or does not exist, HTTP 401: no key"),
        ((200, {}, '{"text": "x"}'), {}, r"expected `choices` with"),
        ((200, {}, "<html>"), {}, "replied with something else than JSON, HTTP 200: <html>"),
        ({**YES, "token_ids": [400]}, {}, "answers with token 400"),
        (YES, {"model": None}, "serves a, b: name one"),
    ],
)
def test_what_ends_a_run_is_said(prompts, tmp_path, ask, reply, settings, message):
    with pytest.raises(ValueError, match=message):
        ask(StandIn(lambda body: reply, ("a", "b")), **{"rows": prompts, "model": "a"} | settings)
    assert not (tmp_path / "a.jsonl").exists()


def test_command_line(tokenizer, prompts, tmp_path, capsys):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    with serve(StandIn(lambda body: YES)) as url:
        argv = ["--server", url, "--tokenizer", str(tmp_path / "tokenizer"), "--max_new_tokens", "10"]
        argv += ["--prompts", str(tmp_path / "prompts.jsonl"), "--output", str(tmp_path / "out" / "a.jsonl")]
        served_regeneration.main([*argv, "--chat_template_kwargs", '{"tone": "w9"}', "--temperatures", "0.0"])
        assert "answers written: 10" in capsys.readouterr().out
        with pytest.raises(ValueError, match=r"extra_body is '\[1\]', expected a JSON object"):
            served_regeneration.main([*argv, "--extra_body", "[1]"])
    rows = list(read_jsonl(tmp_path / "out" / "a.jsonl"))
    assert all(row["chat_template_kwargs"] == {"tone": "w9"} for row in rows) and len(rows) == 10
