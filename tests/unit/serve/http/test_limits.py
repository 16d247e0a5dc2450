"""Requests that a server refuses before they cost anybody anything: sizes, numbers, and programs of clients."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from tests.unit.serve.conftest import byte_tokenizer

from patience import PATIENCE
from veneer.contract.file import CONFIG_FILE, WEIGHTS_FILE
from veneer.errors import ConfigError
from veneer.serve.http import body_route, limits
from veneer.serve.http.app import Api
from veneer.serve.http.errors import TooManyRequestsError
from veneer.serve.http.key import ANYBODY
from veneer.serve.http.limits import BodyLimit
from veneer.serve.http.models import Catalogue
from veneer.serve.http.protocol import CompletionBody
from veneer.serve.http.server_limits import ServerLimits
from veneer.serve.requests import prompts
from veneer.serve.requests.prompts import PromptReader
from veneer.serve.requests.structured import Forms

from .test_server import PROMPT, TURN, Server

SHOUTS = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
KIB = 1024


@pytest.fixture(scope="module")
def server(base_folder, tmp_path_factory) -> Iterator[Server]:
    limits = ServerLimits(body_bytes=300 * KIB, choices=5, in_flight=7)
    running = Server(base_folder, tmp_path_factory.mktemp("none"), limits)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def trusting(base_folder, tmp_path_factory) -> Iterator[Server]:
    limits = ServerLimits(trust_request_templates=True)
    running = Server(base_folder, tmp_path_factory.mktemp("none"), limits)
    yield running
    running.stop()


@pytest.mark.parametrize(
    ("route", "body", "said", "param"),
    [
        ("chat/completions", {"messages": [TURN], "chat_template": SHOUTS}, "--trust-request-temp", "chat_template"),
        ("chat/completions", {"messages": [TURN], "chat_template_kwargs": {"chat_template": "x"}}, "holds chat", None),
        ("chat/completions", {"messages": [TURN], "chat_template_kwargs": {"messages": []}}, "holds messages", None),
        ("chat/completions", {"messages": [TURN], "chat_template_kwargs": {"tokenize": True}}, "holds tokenize", None),
        ("chat/completions", {"messages": [TURN], "n": 6, "temperature": 1}, "6 choices", "n"),
        ("completions", {"prompt": "x", "n": 6, "temperature": 1}, "takes 5 in a request", "n"),
        ("completions", {"prompt": ["x"] * 3, "n": 2, "temperature": 1}, "6 choices (prompts × n)", "n"),
        ("completions", {"prompt": [[97]] * 6}, "6 choices", "n"),
        ("completions", {"prompt": "x", "logprobs": -1}, "must be at least 0", "logprobs"),
        ("completions", {"prompt": "x", "logprobs": 21}, "must be at most 20", "logprobs"),
        ("completions", {"prompt": "x", "prompt_logprobs": -1}, "must be at least 0", "prompt_logprobs"),
        ("chat/completions", {"messages": [TURN], "prompt_logprobs": -1}, "must be at least 0", "prompt_logprobs"),
        ("chat/completions", {"messages": [TURN], "logprobs": True, "top_logprobs": -1}, "between 0 and 20", None),
        ("completions", {"prompt": "x" * 700}, "tokens of at most 5 characters, and the prompt has 700", None),
        ("completions", {"prompt": "x", "logit_bias": dict.fromkeys(range(1025), 1)}, "1025 entries are", "logit_bias"),
        ("completions", {"prompt": "x", "adapter": {str(i): 1 for i in range(1025)}}, "1025 entries", "adapter"),
    ],
)  # fmt: skip
def test_what_is_too_much_is_told(server, route, body, said, param):
    status, answer = server.post(f"/v1/{route}", body)
    assert (status, answer["error"]["param"]) == (400, param)
    assert said in answer["error"]["message"]


def test_as_much_as_is_allowed_is_answered(server):
    body = {"prompt": ["x", "y"], "n": 2, "temperature": 1, "max_tokens": 2, "logprobs": 20, "prompt_logprobs": 20}
    status, answer = server.post("/v1/completions", body)
    assert (status, len(answer["choices"])) == (200, 4)
    chat = {"messages": [TURN], "chat_template_kwargs": {"enable_thinking": False}, "max_tokens": 2}
    assert server.post("/v1/chat/completions", chat)[0] == 200


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [None] * 40_000},
        {"prompt": [["x"]] * 40_000},
        {"prompt": "x", "stop": [1] * 40_000},
        {"prompt": "x", **{f"x{i}": 1 for i in range(20_000)}},
        {"prompt": "x", "x" * 200_000: 1},
        {"prompt": "x", "model": "x" * 200_000},
        {"prompt": "x", "adapter": {"x" * 200_000: 1}},
    ],
    ids=["prompts", "ids", "stop", "fields", "field", "model", "adapter"],
)
def test_a_body_that_is_wrong_in_thousands_of_places_is_told_in_a_few_words(server, body):
    status, answer = server.post("/v1/completions", body)
    assert status == 400
    assert len(json.dumps(answer)) < 1000


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_refused_and_not_held(server, chunked):
    data = json.dumps({"prompt": "x" * (301 * KIB)}).encode()
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    pieces = (data[i : i + KIB] for i in range(0, len(data), KIB))
    connection.request(
        "POST", "/v1/completions", pieces if chunked else data, {"Content-Type": "application/json"},
        encode_chunked=chunked,
    )  # fmt: skip
    answer = connection.getresponse()
    told = json.loads(answer.read())["error"]
    assert (answer.status, told["type"], told["code"]) == (413, "ContentTooLargeError", 413)
    assert f"the body has {len(data)} bytes" in told["message"]
    with pytest.raises(openai.APIStatusError) as refused:
        server.client.completions.create(model="tiny", prompt="x" * (301 * KIB))
    assert refused.value.status_code == 413
    assert server.client.completions.create(model="tiny", prompt=PROMPT, max_tokens=1).choices


@pytest.mark.parametrize(
    ("told", "n_read", "said", "closes"),
    [(11, 0, "has 11 bytes", False), (161, 0, "has 161 bytes", True), (None, 23, "has at least 161 bytes", True)],
)
def test_no_more_of_a_body_is_read_than_a_multiple_of_the_limit(told, n_read, said, closes):
    pieces: list[None] = []
    sent: list[Any] = []

    async def receive() -> Any:
        pieces.append(None)
        assert len(pieces) < 100
        return {"type": "http.request", "body": b"1234567", "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [] if told is None else [(b"content-length", str(told).encode())]
    asyncio.run(BodyLimit(None, most=10)({"type": "http", "headers": headers}, receive, send))  # type: ignore[arg-type]
    start, body = sent
    assert (start["status"], len(pieces)) == (413, n_read)
    assert said in json.loads(body["body"])["error"]["message"]
    assert ((b"connection", b"close") in start["headers"]) == closes


def test_a_client_that_goes_away_within_its_body_is_no_error(server, capfd):
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        fields = [
            "POST /v1/completions HTTP/1.1",
            "Host: localhost",
            "Content-Type: application/json",
            "Content-Length: 99",
        ]
        connection.sendall("\r\n".join([*fields, "", '{"prompt": ']).encode())
    assert server.client.completions.create(model="tiny", prompt=PROMPT, max_tokens=1).choices
    assert capfd.readouterr().err == ""


def test_more_than_is_taken_in_flight_is_told_to_ask_again(server, monkeypatch):
    server.hold(monkeypatch)
    body = {"prompt": "x", "n": 5, "temperature": 1, "max_tokens": 100, "ignore_eos": True, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    stream = connection.getresponse()
    stream.readline()
    fits = server.client.completions.create(model="tiny", prompt="x", n=2, max_tokens=1)
    assert len(fits.choices) == 2
    with pytest.raises(openai.RateLimitError, match=r"5 choices wait.* takes 7 \(--max-in-flight\)") as refused:
        server.client.completions.create(model="tiny", prompt="x", n=3, max_tokens=1)
    assert refused.value.response.headers["Retry-After"] == "1"
    stream.close()
    connection.close()
    monkeypatch.undo()
    server.wait(lambda: server.is_idle)
    again = server.client.completions.create(model="tiny", prompt="x", n=5, max_tokens=1)
    assert len(again.choices) == 5


def test_choices_count_from_their_admission_until_their_answer_ends(monkeypatch):
    engine: Any = SimpleNamespace(backlog=SimpleNamespace(note_refusal=lambda: None))
    monkeypatch.setattr("veneer.serve.schedule.in_flight.InFlight.seconds", lambda _, n: 7 * n)
    catalogue: Any = SimpleNamespace(base="tiny", caller=ANYBODY)
    api = Api(engine, catalogue, ServerLimits(choices=5, in_flight=7))
    monkeypatch.setattr(api, "ask", lambda body: ([], None))
    request: Any = None
    body = CompletionBody(prompt="x", n=5, stream=True)

    async def leaves() -> Any:
        return {"type": "http.disconnect"}

    async def never(message: Any) -> None:
        await asyncio.Event().wait()

    async def asks() -> None:
        admitted = await api.complete(request, body)
        with pytest.raises(TooManyRequestsError, match=r"5 choices wait.* ask again in 21 s"):
            await api.complete(request, body)
        await admitted({"type": "http"}, leaves, never)  # gone before the first event
        await api.complete(request, body)

    asyncio.run(asks())


def test_a_template_of_a_client_is_run_where_it_is_trusted(trusting):
    body = {"messages": [TURN], "chat_template": SHOUTS, "temperature": 0, "max_tokens": 5}
    status, answer = trusting.post("/v1/chat/completions", body)
    plain = trusting.post("/v1/completions", {"prompt": "X", "temperature": 0, "max_tokens": 5})[1]
    assert (status, answer["choices"][0]["message"]["content"]) == (200, plain["choices"][0]["text"])


def test_no_template_tokenizer_or_grammar_holds_the_loop(trusting, monkeypatch):
    """While one of them takes its time, others are answered."""
    begun, may_end = threading.Event(), threading.Event()

    def slow(run: Any) -> Any:
        def waits(*args: Any, **options: Any) -> Any:
            begun.set()
            assert may_end.wait(PATIENCE)
            return run(*args, **options)

        return waits

    body = {"messages": [TURN], "max_tokens": 1, "structured_outputs": {"choice": ["a", "b"]}}
    for owner, name in ((prompts, "chat_text"), (PromptReader, "_ids"), (Forms, "form")):
        found: list[int] = []
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, slow(getattr(owner, name)))
            asking = threading.Thread(
                target=lambda found=found: found.append(trusting.post("/v1/chat/completions", body)[0])
            )
            asking.start()
            assert begun.wait(PATIENCE)
            assert trusting.client.models.list().data
            assert found == []
            may_end.set()
            asking.join()
        assert found == [200]
        begun.clear(), may_end.clear()


def test_a_large_body_is_parsed_beside_the_loop(server, monkeypatch):
    threads: list[int] = []
    monkeypatch.setattr(body_route, "_int", lambda text: threads.append(threading.get_ident()) or int(text))
    assert server.post("/detokenize", {"tokens": [97, 98, 99]}) == (200, {"prompt": "abc"})
    assert threads == [server.thread.ident] * 3
    threads.clear()
    status, told = server.post("/detokenize", {"tokens": [97] * 20_000})
    assert (status, "holds 20000 ids, and at most 127" in told["error"]["message"]) == (400, True)
    assert len(threads) == 20_000
    monkeypatch.setattr(body_route, "_float", lambda text: threads.append(threading.get_ident()) or float(text))
    assert server.post("/detokenize", {"tokens": [9.5] * 20_000})[0] == 400
    assert len(threads) == 40_000
    assert server.thread.ident not in threads
    status, told = server.post("/detokenize", b'{"tokens": [' + b"97, " * 20_000 + b"]}")
    assert (status, "not JSON: Expecting value, at character 80012" in told["error"]["message"]) == (400, True)


def test_a_body_is_parsed_as_json_reads_it():
    text = '{"a": [1, -2.5e3, 12345678901234567890123, true, null], "c": {"\\ud800": "x"}, "b": [[], {}]}'
    assert repr(body_route.parsed(text.encode())) == repr(json.loads(text))


def test_a_body_of_countless_lists_is_refused(server, monkeypatch):
    monkeypatch.setattr(limits, "_MOST_BRACKETS", 40)
    status, told = server.post("/detokenize", b'{"tokens": [' + b"[]," * 38 + b"[]]}")
    assert (
        status,
        "the body has 41 opening brackets ([ and {, those in texts too) and" in told["error"]["message"],
    ) == (413, True)
    status, told = server.post("/detokenize", b'{"tokens": [' + b"[]," * 37 + b"[]]}")
    assert status == 400


def test_a_long_text_has_the_ids_of_a_short_one(monkeypatch):
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(5)
    text = "[{a lóng té}] " * 9
    short = PromptReader(tokenizer, 999).read(text)
    monkeypatch.setattr("veneer.serve.requests.prompts._LONG", 1)
    tokenizer.backend_tokenizer.enable_truncation(5)
    assert PromptReader(tokenizer, 999).read(text) == short
    assert len(short[1]) > 100


def test_a_text_that_cannot_fit_is_not_tokenized():
    class Tokenizer:
        def __call__(self, text: str, **how: Any) -> Any:
            raise AssertionError

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "abc": 1}

    with pytest.raises(ConfigError, match="7 tokens of at most 3 characters, and the prompt has 22 characters"):
        PromptReader(Tokenizer(), 7).read("a" * 22)
    assert PromptReader(byte_tokenizer(), 7).read("a" * 22)[1] == [97] * 22


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"body_bytes": 0}, "body_bytes=0 must be at least 1"),
        ({"choices": 0}, "choices=0"),
        ({"choices": 5, "in_flight": 4}, "in_flight=4 is below choices=5"),
    ],
)
def test_limits_that_would_let_nothing_through_are_told(given, said):
    with pytest.raises(ConfigError, match=said):
        ServerLimits(**given)


@pytest.mark.parametrize("name", ["", ".", "..", "../served", "a/b", "a\0b", "x" * 300, "\ud800"])
def test_a_name_that_leads_elsewhere_is_none(tmp_path, name):
    engine: Any = object()
    for folder in (tmp_path, tmp_path / "served", tmp_path / "served" / "a" / "b"):
        folder.mkdir(exist_ok=True, parents=True)
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            (folder / file).touch()
    with pytest.raises(ConfigError, match="no model"):
        Catalogue(engine, ["tiny"], "", tmp_path / "served").find(name)
