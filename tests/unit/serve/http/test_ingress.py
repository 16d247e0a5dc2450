"""The application in front of several replicas, on replicas that are functions: no engine, and no Ray."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

import pytest
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from veneer.serve.http import ingress
from veneer.serve.http.call import TAKEN, Call, answered
from veneer.serve.http.ingress import Forward, ReplicaLostError, make_ingress
from veneer.serve.http.key_file import Keys
from veneer.serve.http.server_limits import ServerLimits

from .test_key_file import write


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """The application of a replica: it tells what it got."""
    request = Request(scope, receive)
    body = await request.body()
    if b"stream" in body:
        response: Response = StreamingResponse(iter([b"data: 1\n\n", b"data: 2\n\n"]), media_type="text/event-stream")
    else:
        told = {"path": scope["path"], "query": request.url.query, "id": request.headers["x-request-id"]}
        response = JSONResponse({**told, "body": body.decode(errors="replace"), "client": scope["client"][0]}, 201)
    response.headers["X-Request-Id"] = request.headers["x-request-id"]
    await response(scope, receive, send)


class Fake:
    """Replicas that are one application. ``ends`` is called with each message, and may raise."""

    def __init__(self, ends: Callable[[Message], None] = lambda message: None) -> None:
        self.calls, self.n_open, self._ends = list[Call](), 0, ends

    async def answer(self, call: Call) -> AsyncGenerator[Message, None]:
        self.calls.append(call)
        self.n_open += 1
        try:
            async with aclosing(answered(echo, call)) as messages:
                async for message in messages:
                    self._ends(message)
                    yield message
        finally:
            self.n_open -= 1

    async def metrics(self) -> Sequence[Sequence[Metric]]:
        found = []
        for engine, value in (("a", 3), ("b", 5)):
            family = CounterMetricFamily("veneer:tokens", "Tokens.", labels=["engine"])
            family.add_metric([engine], value)
            found.append([family])
        return found


class Answer:
    """The response of an ingress; ``headers`` have the first value of each name, and ``ids`` all of one."""

    def __init__(self, messages: Sequence[Message]) -> None:
        start, *rest = messages
        pairs = [(key.decode(), value.decode()) for key, value in start["headers"]]
        self.status, self.headers = start["status"], dict(reversed(pairs))
        self.ids = [value for key, value in pairs if key == "x-request-id"]
        self.text = b"".join(message.get("body", b"") for message in rest).decode()
        self.is_whole = not rest[-1].get("more_body", False)

    @property
    def json(self) -> Any:
        return json.loads(self.text)


def ask(replicas: Any, path: str, body: Any = None, headers: Any = None, query: bytes = b"", **how: Any) -> Answer:
    """Ask an ingress on this machine."""
    told = {"host": "localhost", **(headers or {})}
    call = Call(
        name=None, method="GET" if body is None else "POST", path=path, query=query, client=("127.0.0.1", 1),
        headers=[(key.lower().encode(), value.encode()) for key, value in told.items()],
        body=b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode(),
    )  # fmt: skip

    async def asked() -> list[Message]:
        return [message async for message in answered(make_ingress(replicas, ["tiny", "alias"], **how), call)][1:]

    return Answer(asyncio.run(asked()))


def test_a_request_comes_to_a_replica_as_it_is():
    replicas = Fake()
    answer = ask(replicas, "/v1/ä b", {"model": "x"}, {"X-Request-Id": "mine"}, b"c=d")
    assert answer.status == 201
    told = {"path": "/v1/ä b", "query": "c=d", "id": "mine", "body": '{"model": "x"}', "client": "127.0.0.1"}
    assert answer.json == told
    assert answer.ids == ["mine"]
    assert [call.name for call in replicas.calls] == ["x"]
    assert replicas.n_open == 0


def test_a_request_without_an_id_gets_one_that_the_replica_sees():
    answer = ask(Fake(), "/v1/models")
    assert answer.ids == [answer.json["id"]] != [""]


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (b'{"model": "sql"}', "sql"),
        (b'{"model": "alias"}', None),
        (b'{"prompt": "x"}', None),
        (b'{"model": 3}', None),
        (b'{"model": "' + b"x" * 256 + b'"}', "x" * 256),
        (b'{"model": "' + b"x" * 257 + b'"}', None),
        (b'{"adapter": {"' + b"x" * 257 + b'": 1}}', None),
        (b'{"model": "alias", "adapter": {"b": 0.5, "a": 1}}', '{"a": 1, "b": 0.5}'),
        (b'{"model": "sql", "adapter": {}}', "sql"),
        (b"[1]", None),
        (b'{"model": "sql"', None),
        (b"\xff", None),
        (b"[" * 100_000, None),
        (b'{"model": "sql", "prompt": "' + b"x" * 100_000 + b'"}', "sql"),
    ],
)
def test_what_a_body_is_sent_by(body, name):
    replicas = Fake()
    assert ask(replicas, "/v1/completions", body).status == 201
    assert [call.name for call in replicas.calls] == [name]
    assert replicas.calls[0].body == body


def test_an_adapters_card_is_asked_of_its_home():
    replicas = Fake()
    ask(replicas, "/v1/adapters/a/b")
    assert replicas.calls[0].name == "a/b"


def ending(after: int) -> Callable[[Message], None]:
    """A replica that ends after so many messages."""
    left = [after]

    def ends(message: Message) -> None:
        if not left[0]:
            raise ReplicaLostError("the replica has ended", retry_seconds=7)
        left[0] -= 1

    return ends


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_replica_that_ends_before_its_answer_is_503_and_says_when_to_ask_again(after):
    replicas = Fake(ending(after))
    answer = ask(replicas, "/v1/completions", {"model": "sql"})
    assert (answer.status, answer.headers["retry-after"]) == (503, "7")
    assert answer.json["error"]["type"] == "ServiceUnavailableError"
    assert replicas.n_open == 0


@pytest.mark.parametrize(
    ("path", "field", "end"),
    [
        ("/v1/completions", "error", ["data: [DONE]", ""]),
        ("/v1/responses", "type", [""]),
        ("/v1/messages", "type", [""]),
    ],
)
def test_a_replica_that_ends_in_a_stream_ends_it_with_an_error(path, field, end):
    answer = ask(Fake(ending(3)), path, {"model": "sql", "stream": True})
    assert (answer.status, answer.is_whole) == (200, True)
    first, told, *rest = answer.text.split("\n\n")
    assert (first, rest) == ("data: 1", end)
    assert "the replica has ended" in told
    assert field in json.loads(told.partition("data: ")[2])


def test_no_replica_that_takes_a_request_is_503(monkeypatch):
    class Nobody(Fake):
        async def answer(self, call: Call) -> AsyncGenerator[Message, None]:
            await asyncio.Event().wait()
            yield TAKEN

    monkeypatch.setattr(ingress, "_TAKEN_SECONDS", 0.01)
    answer = ask(Nobody(), "/ready")
    assert (answer.status, answer.headers["retry-after"]) == (503, "5")
    assert ask(Nobody(), "/health").status == 200


def test_a_client_that_leaves_ends_its_call():
    async def leave() -> int:
        waiting = asyncio.Event()

        async def slow(scope: Scope, receive: Receive, send: Send) -> None:
            waiting.set()
            await receive()
            await receive()  # the client is there

        messages = answered(slow, Call(name=None, method="GET", path="/", query=b"", headers=[], client=None, body=b""))
        assert await anext(messages) == TAKEN
        coming = asyncio.ensure_future(anext(messages))
        await waiting.wait()
        coming.cancel()
        await asyncio.wait([coming])
        return len(asyncio.all_tasks())

    assert asyncio.run(leave()) == 1


def test_a_defect_of_a_replica_is_told_once(caplog):
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        await JSONResponse({}, 500)(scope, receive, send)
        raise ZeroDivisionError

    class Broken(Fake):
        async def answer(self, call: Call) -> AsyncGenerator[Message, None]:
            async for message in answered(broken, call):
                yield message

    assert ask(Broken(), "/v1/models").status == 500
    assert "GET /v1/models met a defect" in caplog.text


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/adapters/sql/pin"])
def test_what_would_change_one_replica_alone_is_refused(path):
    replicas = Fake()
    answer = ask(replicas, path, {"lora_name": "sql"})
    assert answer.status == 400
    assert "copy the adapter into the folder of adapters" in answer.json["error"]["message"]
    assert not replicas.calls


def test_keys_hold_before_a_replica_is_asked(tmp_path):
    keys = Keys(write(tmp_path / "keys.json", {"name": "a"}, {"name": "all", "scopes": ["infer", "admin"]}))
    replicas = Fake()
    for key, path, status in (
        (None, "/v1/models", 401), ("x", "/v1/models", 401), ("a", "/metrics", 403), ("all", "/metrics", 200),
        (None, "/health", 200),
    ):  # fmt: skip
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        assert ask(replicas, path, keys=keys, headers=headers).status == status
    assert not replicas.calls
    assert ask(replicas, "/v1/models", keys=keys, headers={"Authorization": "Bearer a"}).status == 201
    assert (b"authorization", b"Bearer a") in replicas.calls[0].headers  # the replica looks at it too


def test_a_body_beyond_the_limit_comes_to_no_replica():
    replicas = Fake()
    answer = ask(replicas, "/v1/completions", b"x" * 101, limits=ServerLimits(body_bytes=100))
    assert answer.status == 413
    assert not replicas.calls


def test_metrics_are_those_of_all_replicas():
    answer = ask(Fake(), "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert answer.text.splitlines() == [
        "# HELP veneer:tokens_total Tokens.", "# TYPE veneer:tokens_total counter",
        'veneer:tokens_total{engine="a"} 3.0', 'veneer:tokens_total{engine="b"} 5.0',
    ]  # fmt: skip


def test_the_name_of_a_base_is_no_adapters():
    forward = Forward(Fake(), ["tiny"])
    assert (forward.name(b'{"model": "tiny"}'), forward.name(b'{"model": "other"}')) == (None, "other")
