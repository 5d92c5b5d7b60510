"""Answers through a stand-in server on this machine against `regenerate`, and under all that a server can do wrong."""

import asyncio
import json
import signal
import threading
import time
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


def list_of(path):
    return list(read_jsonl(path))


@pytest.fixture
def prompts():
    return [
        {"id": f"p{index}", "prompt": " ".join(f"w{(index * 5 + word) % 26}" for word in range(1 + index % 4))}
        for index in range(8)
    ]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(served_regeneration, "_WAIT_SECONDS", 0.001)


class StandIn:
    """Answers completions with `complete(body)`: a choice, or (status, headers, text) for an error."""

    def __init__(self, complete, models=("tiny",)):
        self.complete, self.models = complete, models
        self.bodies, self.headers = [], []
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()

    def reply(self, path, headers, body):
        if path == "/v1/models":
            return 200, {}, json.dumps({"data": [{"id": model} for model in self.models]})
        if path != "/v1/completions":
            return 404, {}, "no such path"
        with self.lock:
            self.bodies.append(body)
            self.headers.append(headers)
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            choice = self.complete(body)
        finally:
            with self.lock:
                self.under_way -= 1
        return choice if isinstance(choice, tuple) else (200, {}, json.dumps({"choices": [choice]}))


@contextmanager
def serve(stand_in: StandIn):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.do_POST()

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            reply = stand_in.reply(self.path, dict(self.headers), json.loads(body) if body else None)
            if reply[0] is None:  # hang up
                self.close_connection = True
                return
            status, headers, text = reply
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(text.encode()))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)


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
def test_greedy_answers_are_those_of_regenerate(target, tokenizer, prompts, tmp_path, form):
    regenerate(target, tokenizer, prompts, tmp_path / "local.jsonl", batch_size=4, temperatures=(0.0,), **SETTINGS)
    expected = {row["id"]: row for row in list_of(tmp_path / "local.jsonl")}
    for row in expected.values():
        row["made_with"] = {"model": "tiny", "max_new_tokens": 10, "seed": 0}
        if row["finished"]:
            row["answer_ids"][0][-1] = 1
    assert {row["finished"] for row in expected.values()} == {True, False}
    complete = answer_with(target, tokenizer, with_ids=form != "text", with_end=form == "ids")
    with serve(StandIn(complete)) as url:
        report = regenerate_served(url, tokenizer, prompts, tmp_path / "a.jsonl", temperatures=(0.0,), **SETTINGS)
    rows = list_of(tmp_path / "a.jsonl")
    assert {row.pop("retokenized", False) for row in rows} == {form == "text"}
    assert report.retokenized == (8 if form == "text" else 0)
    assert {row["id"]: row for row in rows} == expected
    assert (report.written, report.unfinished) == (8, sum(not row["finished"] for row in expected.values()))
    for row, prepared in zip(rows, prepare_dataset(rows, tokenizer, 100), strict=True):
        assert prepared["input_ids"] == row["prompt_ids"][0] + row["answer_ids"][0]


def test_it_runs_in_a_notebook_and_is_interrupted_at_once(tokenizer, prompts, tmp_path):
    under_way, answered = threading.Event(), threading.Event()

    def complete(body):
        under_way.set()
        answered.wait(timeout=30)
        return {"text": "w1", "finish_reason": "stop", "token_ids": [7, 1]}

    def call(url):
        return regenerate_served(url, tokenizer, prompts, tmp_path / "a.jsonl", **SETTINGS)

    async def cell(url):  # a notebook's code runs within an event loop
        return call(url)

    def interrupt():
        assert under_way.wait(timeout=30)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    with serve(StandIn(complete)) as url:
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            call(url)
        assert not answered.is_set()  # and the requests are still under way
        answered.set()
        assert asyncio.run(cell(url)).written == 8


def test_requests_say_what_was_asked_for(target, tokenizer, prompts, tmp_path):
    stand_in = StandIn(answer_with(target, tokenizer), models=("a", "b"))
    prompts = [{**prompt, "chat_template_kwargs": {"tone": "w9"}} for prompt in prompts[:4]]
    with serve(stand_in) as url:
        regenerate_served(
            url + "/",
            tokenizer,
            prompts,
            tmp_path / "a.jsonl",
            model="b",
            seed=3,
            api_key="key",
            extra_body={"top_p": 0.5},
            **SETTINGS,
        )
    bodies = {tuple(body["prompt"]): body for body in stand_in.bodies}
    for index, prompt in enumerate(prompts):
        body = bodies[tuple(encode_prompt(prompt["prompt"], tokenizer, None, {"tone": "w9"}))]
        assert body["temperature"] == (0.0, 0.8)[index % 2]
        assert (body["model"], body["max_tokens"], body["top_p"], body["return_token_ids"]) == ("b", 10, 0.5, True)
    assert len({body["seed"] for body in stand_in.bodies}) == 4
    assert all(headers["Authorization"] == "Bearer key" for headers in stand_in.headers)
    assert all(row["chat_template_kwargs"] == {"tone": "w9"} for row in list_of(tmp_path / "a.jsonl"))


def test_requests_under_way_are_bounded(tokenizer, prompts, tmp_path):
    def complete(body):
        time.sleep(0.02)
        return {"text": "w1", "finish_reason": "stop", "token_ids": [7, 1]}

    stand_in = StandIn(complete)
    with serve(stand_in) as url:
        regenerate_served(url, tokenizer, prompts, tmp_path / "a.jsonl", concurrency=3, **SETTINGS)
    assert stand_in.most_under_way == 3


def test_conversations_are_answered_turn_by_turn(tokenizer, tmp_path):
    rows = [
        {"id": "a", "turns": ["w1", "w2 w3", "w4"], "system": "w9"},
        {"id": "long", "turns": ["w5", "w6 " * 50, "w7"]},
        {"id": "cut", "turns": ["w8", "w6"]},
    ]

    def complete(body):
        word = 6 + sum(body["prompt"]) % 26
        if tokenizer.convert_tokens_to_ids("w8") in body["prompt"]:
            return {"text": "w1 w1", "finish_reason": "length", "token_ids": [7] * 10}
        return {"text": tokenizer.decode([word]), "finish_reason": "stop", "token_ids": [word, 1]}

    with serve(StandIn(complete)) as url:
        report = regenerate_served(url, tokenizer, rows, tmp_path / "a.jsonl", **SETTINGS)
        assert regenerate_served(url, tokenizer, rows, tmp_path / "a.jsonl", **SETTINGS).written == 0
    answered = {row["id"]: row for row in list_of(tmp_path / "a.jsonl")}
    said = [message["content"] for message in answered["a"]["messages"]]
    assert said[:2] + said[3::2] == ["w9", "w1", "w2 w3", "w4"]
    assert said[2::2] == [tokenizer.decode(ids[:-1]) for ids in answered["a"]["answer_ids"]]
    for number in range(3):
        prompt = encode_prompt(answered["a"]["messages"][: 2 + 2 * number], tokenizer)
        assert answered["a"]["prompt_ids"][number] == prompt
        assert answered["a"]["answer_ids"][number] == [6 + sum(prompt) % 26, 1]
    assert answered["cut"]["answer_ids"] == [[7] * 10] and len(answered["long"]["answer_ids"]) == 1
    assert (report.prompts, report.written, report.too_long, report.stopped) == (3, 3, 0, 2)
    assert "ended before their last turn: 2" in str(report)


def test_an_interrupted_run_is_resumed(target, tokenizer, prompts, tmp_path):
    rows = [{"id": f"c{index}", "turns": [f"w{index}", "w5", "w6"]} for index in range(4)] + prompts
    complete = answer_with(target, tokenizer)
    with serve(StandIn(complete)) as url:
        regenerate_served(url, tokenizer, rows, tmp_path / "whole.jsonl", **SETTINGS)
    stand_in = StandIn(complete)
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "part.jsonl").write_bytes(b"".join(lines[:5]) + lines[5][:-4])
    with serve(stand_in) as url:
        report = regenerate_served(url, tokenizer, rows, tmp_path / "part.jsonl", **SETTINGS)
    assert (report.resumed, report.written) == (5, len(lines) - 5) and len(stand_in.bodies) >= report.written

    def by_id(name):
        return {row["id"]: row for row in list_of(tmp_path / name)}

    assert by_id("part.jsonl") == by_id("whole.jsonl")
    with serve(stand_in) as url:
        for changed, left in (({"temperatures": (0.3,)}, rows), ({}, rows[5:])):
            with pytest.raises(ValueError, match=r"line \d+ is no answer .* this call would write"):
                regenerate_served(url, tokenizer, left, tmp_path / "whole.jsonl", **SETTINGS | changed)


def test_answers_of_another_model_seed_or_body_are_refused(target, tokenizer, prompts, tmp_path):
    path, given = tmp_path / "a.jsonl", {"extra_body": {"top_p": 0.5}}
    with serve(StandIn(answer_with(target, tokenizer), ("other",))) as url:
        regenerate_served(url, tokenizer, prompts, path, model="tiny", **given, **SETTINGS)
        written = path.read_bytes()
        for settings, message in (
            ({"seed": 1, "model": "tiny"} | given, r"line 1 .* settings \(seed was 0, is 1\): repeat the earlier"),
            ({"model": "tiny"}, r"other settings \(extra_body was \{'top_p': 0.5\}, is None\)"),
            (given, r"other settings \(model was 'tiny', is 'other'\)"),
        ):
            with pytest.raises(ValueError, match=message):
                regenerate_served(url, tokenizer, prompts, path, **settings, **SETTINGS)
    assert path.read_bytes() == written


def test_busy_failing_and_vanishing_servers_are_asked_again(target, tokenizer, prompts, tmp_path):
    complete = answer_with(target, tokenizer)
    troubles = iter([(429, {"Retry-After": "0"}, "busy"), (503, {}, "loading"), (None,)])
    with serve(StandIn(lambda body: next(troubles, None) or complete(body))) as url:
        report = regenerate_served(
            url, tokenizer, prompts[:3], tmp_path / "a.jsonl", concurrency=1, timeout=20, **SETTINGS
        )
    assert report.written == 3 and next(troubles, None) is None


def test_a_server_that_stays_away_ends_the_run_with_its_answers_kept(
    target, tokenizer, prompts, tmp_path, monkeypatch
):
    monkeypatch.setattr(served_regeneration, "_ATTEMPTS", 3)
    complete = answer_with(target, tokenizer)
    calls = iter(range(100))
    stand_in = StandIn(lambda body: complete(body) if next(calls) < 2 else (500, {}, "out of memory"))
    with serve(stand_in) as url:
        with pytest.raises(
            ConnectionError, match=r"no answer in 3 attempts .*HTTP 500: out of memory.*repeat the call"
        ):
            regenerate_served(url, tokenizer, prompts, tmp_path / "a.jsonl", concurrency=1, **SETTINGS)
    assert len(list_of(tmp_path / "a.jsonl")) == 2
    with pytest.raises(ConnectionError, match=r"no answer in 3 attempts \(.*refused"):  # the server is gone
        regenerate_served(url, tokenizer, prompts, tmp_path / "b.jsonl", **SETTINGS)


def test_refused_prompts_are_counted_and_refused_requests_end_the_run(target, tokenizer, prompts, tmp_path):
    complete = answer_with(target, tokenizer)
    refused = encode_prompt("w5 w6", tokenizer)
    stand_in = StandIn(lambda body: (400, {}, "too long") if body["prompt"] == refused else complete(body))
    with serve(stand_in) as url:
        report = regenerate_served(url, tokenizer, prompts, tmp_path / "a.jsonl", **SETTINGS)
    assert (report.written, dict(report.refused)) == (7, {"HTTP 400: too long": 1})
    assert "prompts refused (HTTP 400: too long): 1" in str(report)

    for reply, message in (
        ((400, {}, "no field prompt"), "refuses the requests: HTTP 400: no field prompt"),
        ((401, {}, "no key"), "refuses access or does not exist, HTTP 401: no key"),
        ((200, {}, '{"text": "x"}'), r"expected `choices` with"),
        ((200, {}, "<html>"), "replied with something else than JSON, HTTP 200: <html>"),
        ({"text": "x", "finish_reason": "stop", "token_ids": [400]}, "answers with token 400"),
    ):
        with serve(StandIn(lambda body, reply=reply: reply)) as url:
            with pytest.raises(ValueError, match=message):
                regenerate_served(url, tokenizer, prompts, tmp_path / "b.jsonl", **SETTINGS)
    for names in ((), ("a", "b")):
        with serve(StandIn(complete, names)) as url:
            with pytest.raises(ValueError, match=r"serves (a, b|no model): name one"):
                regenerate_served(url, tokenizer, prompts, tmp_path / "b.jsonl", **SETTINGS)


def test_bad_settings_and_rows_are_refused_before_a_request(tokenizer, tmp_path):
    for output, settings, rows, message in (
        ("a.jsonl", {"concurrency": 0}, [], "concurrency is 0"),
        ("a.jsonl", {}, [{"id": 1}], "Row 0: it has the fields"),
        ("a.json", {}, [], r"expected a \.jsonl file"),
    ):
        with pytest.raises(ValueError, match=message):
            regenerate_served("http://127.0.0.1:9", tokenizer, rows, tmp_path / output, **SETTINGS | settings)


def test_command_line(target, tokenizer, prompts, tmp_path, capsys):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    with serve(StandIn(answer_with(target, tokenizer))) as url:
        argv = ["--server", url, "--tokenizer", str(tmp_path / "tokenizer"), "--max_new_tokens", "10"]
        argv += ["--prompts", str(tmp_path / "prompts.jsonl"), "--output", str(tmp_path / "out" / "a.jsonl")]
        served_regeneration.main([*argv, "--chat_template_kwargs", '{"tone": "w9"}', "--temperatures", "0.0"])
        assert "answers written: 8" in capsys.readouterr().out
        with pytest.raises(ValueError, match=r"extra_body is '\[1\]', expected a JSON object"):
            served_regeneration.main([*argv, "--extra_body", "[1]"])
    rows = list_of(tmp_path / "out" / "a.jsonl")
    assert all(row["chat_template_kwargs"] == {"tone": "w9"} for row in rows) and len(rows) == 8
