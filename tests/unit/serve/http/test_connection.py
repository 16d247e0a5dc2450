"""Connections: bytes, headers and seconds of a client are limited, and clients that say nothing hurt nobody."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, StreamingResponse
from starlette.requests import ClientDisconnect
from uvicorn.server import ServerState

from patience import PATIENCE, wait_until
from veneer.serve.http import connection
from veneer.serve.http.connection import ConnectionLimits, Connections, made
from veneer.serve.http.lifecycle import Lifecycle
from veneer.serve.http.limits import BodyLimit
from veneer.serve.http.server import Server

LIMITS = ConnectionLimits(
    head_seconds=0.4, body_seconds=0.5, body_rate=1000, unread_seconds=0.6, linger_seconds=0.7, idle_seconds=0.8,
    connections=7,
)  # fmt: skip
PATIENT = ConnectionLimits(connections=11)
HEAD = b"GET /health HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /size HTTP/1.1\r\nHost: x\r\n"
OK = b"HTTP/1.1 200 OK\r\n"


def application() -> FastAPI:
    app = FastAPI()
    app.add_middleware(BodyLimit, most=1 << 20)
    engine: Any = SimpleNamespace(end_all=lambda: 0, failure=None, is_running=True)
    app.state.engine, app.state.lifecycle, app.state.may_end = engine, Lifecycle(engine), threading.Event()
    app.state.begun, app.state.left = list[str](), list[str]()

    async def size(request: Request) -> dict[str, Any]:
        try:
            n = len(await request.body())
        except ClientDisconnect:
            n = 0
        return {"n": n, "trailer": request.headers.get("x-trailer")}

    def waits(name: str = "") -> PlainTextResponse:
        app.state.begun.append(name)
        app.state.may_end.wait(PATIENCE)
        return PlainTextResponse("waited")

    async def leaves(request: Request, name: str) -> PlainTextResponse:
        app.state.begun.append(name)
        while (await request.receive())["type"] != "http.disconnect":
            pass
        app.state.left.append(name)
        return PlainTextResponse("left")

    async def stream(n: int) -> StreamingResponse:
        async def pieces() -> Any:
            for _ in range(n):
                yield b"x" * 65_536

        return StreamingResponse(pieces())

    app.get("/health")(lambda: PlainTextResponse("well"))
    app.get("/waits")(waits)
    app.get("/leaves")(leaves)
    app.get("/stream")(stream)
    app.post("/size")(size)
    return app


class Running:
    """A server of a small application on a port of its own."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.app, self.socket = application(), socket.create_server(("127.0.0.1", 0))
        self.server = Server(self.app, limits=limits)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        self.wait(lambda: self.server.started)

    def wait(self, reached: Callable[[], bool]) -> None:
        wait_until(reached)

    def open(self, sent: bytes = b"") -> socket.socket:
        made = socket.create_connection(self.socket.getsockname(), timeout=PATIENCE)
        made.sendall(sent)
        return made

    def ask(self, sent: bytes) -> bytes:
        """Return all bytes until the server closes."""
        with self.open(sent) as client:
            return rest(client)

    def stop(self) -> None:
        self.app.state.may_end.set()
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture(scope="module")
def strict() -> Iterator[Running]:
    running = Running(LIMITS)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def patient() -> Iterator[Running]:
    running = Running(PATIENT)
    yield running
    running.stop()


def rest(client: socket.socket) -> bytes:
    found = b""
    try:
        while piece := client.recv(1 << 16):
            found += piece
    except ConnectionResetError:
        pass
    return found


def told(answer: bytes) -> tuple[int, str]:
    """The status of a refusal, and its message."""
    head, _, body = answer.partition(b"\r\n\r\n")
    error = json.loads(body)["error"]
    assert b"connection: close" in head
    assert error["code"] == int(head.split()[1])
    return error["code"], error["message"]


def closing(head: bytes) -> bytes:
    return head + b"Connection: close\r\n\r\n"


@pytest.mark.parametrize("start", [HEAD + b"X-Long: ", b"GET /health?"], ids=["header", "address"])
def test_a_huge_head_is_refused_before_it_is_parsed(patient, start):
    with patient.open(start) as client:
        sender = threading.Thread(target=lambda: client.sendall(b"x" * (1 << 24)))
        sender.start()
        status, message = told(rest(client))
        sender.join()
    assert status == 431
    assert "more than 65536 bytes" in message
    assert patient.ask(closing(HEAD)).startswith(OK)


def test_no_more_of_a_head_is_parsed_than_it_may_have(patient, monkeypatch):
    fed: list[int] = []
    feed = connection.HttpToolsProtocol.data_received
    monkeypatch.setattr(
        connection.HttpToolsProtocol, "data_received", lambda self, data: fed.append(len(data)) or feed(self, data)
    )
    with patient.open(HEAD + b"X-Long: " + b"x" * 300_000) as client:
        assert told(rest(client))[0] == 431
    assert sum(fed) == 65_537


def test_the_largest_head_is_answered(patient):
    front, end = HEAD + b"X-Long: ", b"\r\nConnection: close\r\n\r\n"
    assert patient.ask(front + b"x" * (65_536 - len(front) - len(end)) + end).startswith(OK)


@pytest.mark.parametrize(("n", "status"), [(126, 200), (127, 431)])
def test_headers_are_counted(patient, n, status):
    answer = patient.ask(closing(HEAD + b"".join(b"X-%d: y\r\n" % i for i in range(n))))
    assert int(answer.split()[1]) == status
    if status == 431:
        assert "more than 128 headers" in told(answer)[1]


def test_headers_are_counted_anew_for_each_request(patient):
    asked = HEAD + b"X-Y: z\r\n" * 100
    assert patient.ask((asked + b"\r\n") * 2 + closing(asked)).count(OK) == 3


def test_bodies_may_be_longer_than_heads_and_requests_follow_one_another(patient):
    body = b"y" * 200_000
    one = POST + b"Content-Length: 200000\r\n"
    answer = patient.ask(one + b"\r\n" + body + one + b"\r\n" + body + closing(one) + body)
    assert answer.count(b'{"n":200000,') == 3


def test_headers_behind_a_body_mean_nothing(patient):
    chunked = closing(POST + b"Transfer-Encoding: chunked\r\n")
    answer = patient.ask(chunked + b"3\r\nabc\r\n0\r\nX-Trailer: z\r\n\r\n")
    assert b'{"n":3,"trailer":null}' in answer


@pytest.mark.parametrize(
    "rest_of_it",
    [
        b"3;x=" + b"y" * (1 << 19), b"3\r\nabc\r\n0\r\nX-Trailer: " + b"z" * (1 << 19),
        b"3\r\nabc\r\n0\r\n" + b"X-T: z\r\n" * 200,
    ],
    ids=["extension", "trailer", "trailers"],
)  # fmt: skip
def test_what_is_no_body_is_counted_within_it(patient, rest_of_it):
    answer = patient.ask(closing(POST + b"Transfer-Encoding: chunked\r\n") + rest_of_it)
    assert told(answer)[0] == 431


def test_chunks_of_a_body_are_counted(patient):
    chunked = closing(POST + b"Transfer-Encoding: chunked\r\n")
    assert b'{"n":7000,' in patient.ask(chunked + b"1\r\nx\r\n" * 3_800 + b"c80\r\n" + b"y" * 3_200 + b"\r\n0\r\n\r\n")
    status, message = told(patient.ask(chunked + b"1\r\nx\r\n" * 60_000))
    assert (status, "most of them below 64 bytes: send longer chunks" in message) == (413, True)


@pytest.mark.parametrize("line", [b"CONNECT x:80", b"GET http://[", b"GET /\xc3\xa9"])
def test_an_address_that_is_none_is_refused(patient, line):
    assert told(patient.ask(line + b" HTTP/1.1\r\nHost: x\r\n\r\n"))[0] == 400


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
def test_requests_that_wish_for_another_protocol_are_answered_in_this_one(patient, protocol, capfd):
    wish = b"Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABk\r\nUpgrade: " + protocol + b"\r\n"
    one = POST + wish + b"Content-Length: 70003\r\n\r\n"
    chunked = POST + wish + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    with patient.open(one + b"y" * 70_000) as client:
        time.sleep(0.1)
        client.sendall(b"yyy" + chunked * 2 + HEAD + wish + b"\r\n" + closing(HEAD))
        answer = rest(client)
    assert [answer.count(each) for each in (OK, b'{"n":70003,', b'{"n":3,', b"\r\n\r\nwell")] == [5, 1, 2, 2]
    assert capfd.readouterr().err == ""


def test_bytes_between_requests_are_counted(patient):
    with patient.open(HEAD + b"\r\n") as client:
        assert client.recv(1 << 16).startswith(OK)
        client.sendall(b"\r\n" * 40_000)
        assert told(rest(client))[0] == 431


@pytest.mark.parametrize("sent", [b"", b"\r\n"], ids=["nothing", "empty"])
def test_a_client_that_says_nothing_is_disconnected(strict, sent):
    with strict.open() as client:
        client.sendall(sent)
        answer = rest(client)
    assert answer == b"" or told(answer)[0] == 408


def test_a_client_that_sends_half_a_head_is_told(strict):
    assert told(strict.ask(HEAD)) == (408, "the request's headers did not come within 0.4 s: send it again")


def slowly(client: socket.socket) -> threading.Thread:
    """Send a byte now and then."""

    def send() -> None:
        try:
            for _ in range(600):
                client.sendall(b"y")
                time.sleep(0.1)
        except OSError:
            pass

    sending = threading.Thread(target=send)
    sending.start()
    return sending


@pytest.mark.parametrize(
    ("start", "part"),
    [
        (HEAD + b"X-Slow: ", "headers"), (POST + b"Content-Length: 90000\r\n\r\n", "body"),
        (POST + b"Expect: 100-continue\r\nContent-Length: 90000\r\n\r\n", "body"),
    ],
)  # fmt: skip
def test_a_client_that_sends_a_byte_now_and_then_is_told(strict, start, part):
    with strict.open(start) as client:
        sending = slowly(client)
        status, message = told(rest(client).removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n"))
        with contextlib.suppress(OSError):  # closed by the server already
            client.shutdown(socket.SHUT_RDWR)
        sending.join()
    assert status == 408
    assert f"the request's {part} did not come within 0." in message


def test_a_body_has_more_time_the_more_of_it_comes(strict):
    with strict.open(closing(POST + b"Content-Length: 4000\r\n")) as client:
        for _ in range(4):
            client.sendall(b"y" * 1000)
            time.sleep(0.3)
        assert b'{"n":4000,' in rest(client)


def test_the_rest_of_a_body_that_has_its_answer_is_awaited_no_longer(strict):
    with strict.open(POST + b"Content-Length: 3000000\r\n\r\n") as client:
        sending = slowly(client)
        answer = rest(client)
        with contextlib.suppress(OSError):  # closed by the server already
            client.shutdown(socket.SHUT_RDWR)
        sending.join()
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert answer.count(b"HTTP/1.1") == 1


def test_a_connection_rests_no_longer_than_it_may(strict):
    assert strict.ask(HEAD + b"\r\n").startswith(OK)
    assert strict.ask(HEAD + b"\r\n\r\n").startswith(OK)


def test_an_answer_may_take_longer_than_all_limits(strict):
    strict.app.state.may_end.clear()
    with strict.open(b"GET /waits HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n") as client:
        time.sleep(2.5)
        strict.app.state.may_end.set()
        assert rest(client).endswith(b"waited")


def test_a_client_that_does_not_read_is_disconnected(strict):
    with strict.open(b"GET /stream?n=4000 HTTP/1.1\r\nHost: x\r\n\r\n") as client:
        client.recv(1)
        strict.wait(lambda: not len(strict.server.connections))


@pytest.mark.parametrize("closes", [False, True])
def test_an_answer_has_more_time_the_more_of_it_is_read(closes):
    clock, transport = SimpleNamespace(now=100.0), Mock(spec=asyncio.Transport)
    limits = ConnectionLimits(unread_seconds=60, body_rate=1000, head_seconds=math.inf)
    loop: Any = SimpleNamespace(time=lambda: clock.now)
    reading = made(Connections(limits))(uvicorn.Config(application()), ServerState(), {}, loop)
    transport.get_extra_info.return_value = None
    transport.is_closing.return_value = closes
    transport.get_write_buffer_size.return_value = 30_000
    reading.connection_made(transport)
    if not closes:
        reading.pause_writing()
    reading.check()
    clock.now += 61
    transport.get_write_buffer_size.return_value = 20_000
    reading.check()
    assert not transport.abort.called
    clock.now += 9.5
    reading.check()
    assert transport.abort.called


def test_clients_that_say_nothing_make_room_for_others(patient):
    silent = [patient.open() for _ in range(30)]
    for _ in range(3):
        assert patient.ask(closing(HEAD)).startswith(OK)
    assert len(patient.server.connections) <= 11
    assert patient.server.connections.n_evicted >= 19
    for client in silent:
        client.close()


def test_clients_that_rest_make_room_after_those_that_owe_a_request(strict):
    with strict.open(HEAD + b"\r\n") as resting:
        assert resting.recv(1 << 16).startswith(OK)
        silent = [strict.open() for _ in range(9)]
        resting.sendall(closing(HEAD))
        assert rest(resting).startswith(OK)
    for client in silent:
        client.close()


def test_a_client_beyond_those_that_wait_for_answers_is_told_to_come_again(strict):
    strict.app.state.may_end.clear()
    strict.wait(lambda: not len(strict.server.connections))
    asked = closing(b"GET /waits HTTP/1.1\r\nHost: x\r\n")
    waiting = [strict.open(asked) for _ in range(7)]
    strict.wait(lambda: len(strict.server.server_state.tasks) == 7)
    answer = strict.ask(closing(HEAD))
    status, message = told(answer)
    assert (status, b"Retry-After: 1\r\n" in answer) == (503, True)
    assert message.endswith("7 connections, and all wait for answers: ask again in 1 s")
    assert told(strict.ask(closing(HEAD)))[1].endswith("ask again in 4 s")  # its place is behind the other's
    strict.app.state.may_end.set()
    for client in waiting:
        assert rest(client).endswith(b"waited")
    assert strict.ask(closing(HEAD)).startswith(OK)


def pipelined(path: str, names: Sequence[str]) -> bytes:
    return b"".join(f"GET {path}?name={name} HTTP/1.1\r\nHost: x\r\n\r\n".encode() for name in names)


def waiting(running: Running) -> int:
    """Number of requests behind others of their connections."""
    return sum(len(each.pipeline) for each in list(running.server.server_state.connections))


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("at_once", [1, 7], ids=["later", "all"])
def test_an_answer_ends_if_its_client_has_pipelined_and_leaves(patient, at_once, resets):
    names = [f"{at_once}-{resets}-{i}" for i in range(7)]
    with patient.open(pipelined("/leaves", names[:at_once])) as client:
        patient.wait(lambda: names[0] in patient.app.state.begun)
        client.sendall(pipelined("/leaves", names[at_once:]))
        patient.wait(lambda: waiting(patient) == 6)
        if resets:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    patient.wait(lambda: names[0] in patient.app.state.left)
    patient.wait(lambda: not patient.server.server_state.tasks)
    assert [name for name in patient.app.state.begun if name in names] == names[:1]


def test_an_answer_that_comes_when_its_client_has_pipelined_and_left_is_no_error(patient, caplog):
    log = logging.getLogger("uvicorn.error")
    log.addHandler(caplog.handler)
    patient.app.state.may_end.clear()
    with patient.open(pipelined("/waits", "abc")):
        patient.wait(lambda: waiting(patient) == 2)
    patient.wait(lambda: not len(patient.server.connections))
    patient.app.state.may_end.set()
    patient.wait(lambda: not patient.server.server_state.tasks)
    log.removeHandler(caplog.handler)
    assert caplog.messages == []
    assert patient.app.state.begun[-1] == "a"


def test_old_clients_get_bodies_without_chunks(patient):
    head, _, body = patient.ask(b"GET /stream?n=3 HTTP/1.0\r\n\r\n").partition(b"\r\n\r\n")
    assert body == b"x" * 3 * 65_536
    assert b"transfer-encoding" not in head.lower()
    assert b"connection: close" in head.lower()
    head, _, body = patient.ask(b"GET /health HTTP/1.0\r\n\r\n").partition(b"\r\n\r\n")
    assert (b"content-length: 4" in head, body) == (True, b"well")
    assert patient.ask(b"HEAD /stream?n=3 HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 405")
    assert b"transfer-encoding: chunked" in patient.ask(closing(b"GET /stream?n=1 HTTP/1.1\r\nHost: x\r\n")).lower()


def test_as_many_files_as_allowed_may_be_open(monkeypatch):
    set_to: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: set_to.append(limits))
    connection.allow_files()
    assert set_to == [(4096, 4096)]
    assert connection.Connections().most == 768
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)
    connection.allow_files()
    assert len(set_to) == 1
    assert connection.Connections().most == 8192
