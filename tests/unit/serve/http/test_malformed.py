"""Malformed HTTP: every connection ends, none with an error of the server, and others are answered."""

from __future__ import annotations

import contextlib
import random
import re
import socket
import threading
from collections.abc import Iterator

import pytest

from veneer.serve.http.connection import ConnectionLimits

from .test_connection import HEAD, OK, POST, Running, closing, rest

LIMITS = ConnectionLimits(head_seconds=0.5, body_seconds=0.5, idle_seconds=0.5, linger_seconds=1.0)
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
CASES = {
    "a length below 0": POST + b"Content-Length: -5\r\n\r\nabcde",
    "a length that is no number": POST + b"Content-Length: five\r\n\r\nabcde",
    "a length beyond 64 bits": POST + b"Content-Length: 99999999999999999999999\r\n\r\nabcde",
    "a length of thousands of digits": POST + b"Content-Length: " + b"9" * 9000 + b"\r\n\r\nabcde",
    "a huge length": POST + b"Content-Length: 900000000000000000\r\n\r\nabcde",
    "two lengths": POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
    "a length and chunks": POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "another encoding": POST + b"Transfer-Encoding: gzip, identity\r\n\r\nabc",
    "a chunk below 0": CHUNKED + b"-3\r\nabc\r\n0\r\n\r\n",
    "a chunk beyond 64 bits": CHUNKED + b"fffffffffffffffffffff\r\nabc\r\n0\r\n\r\n",
    "a huge chunk": CHUNKED + b"fffffffffffff\r\nabc\r\n0\r\n\r\n",
    "a chunk that is no number": CHUNKED + b"zz\r\nabc\r\n0\r\n\r\n",
    "a chunk without its end": CHUNKED + b"3\r\nabcdef\r\n0\r\n\r\n",
    "an extension": CHUNKED + b"3;x=y\r\nabc\r\n0\r\n\r\n",
    "a long extension": CHUNKED + b"3;x=" + b"y" * 200_000,
    "a long header behind a body": CHUNKED + b"0\r\nX: " + b"y" * 200_000,
    "a byte of zero in the address": b"GET /he\0alth HTTP/1.1\r\nHost: x\r\n\r\n",
    "a byte of zero in a name": HEAD + b"X-\0: y\r\n\r\n",
    "a byte of zero in a value": HEAD + b"X-Y: a\0b\r\n\r\n",
    "an escaped byte of zero": b"GET /health%00 HTTP/1.1\r\nHost: x\r\n\r\n",
    "bytes above 127": b"GET /h\xe9alth\xff HTTP/1.1\r\nHost: x\r\n\r\n",
    "an escape cut short": b"GET /health%2 HTTP/1.1\r\nHost: x\r\n\r\n",
    "a whole address": b"GET http://elsewhere:99/health HTTP/1.1\r\nHost: x\r\n\r\n",
    "a port that is none": b"GET http://elsewhere:999999/health HTTP/1.1\r\nHost: x\r\n\r\n",
    "a tunnel": b"CONNECT elsewhere:443 HTTP/1.1\r\nHost: x\r\n\r\n",
    "a star": b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
    "no path": b"GET ?x=1 HTTP/1.1\r\nHost: x\r\n\r\n",
    "no address": b"GET  HTTP/1.1\r\nHost: x\r\n\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "a method that is none": b"FETCH /health HTTP/1.1\r\nHost: x\r\n\r\n",
    "a long method": b"G" * 70_000 + b" / HTTP/1.1\r\n\r\n",
    "a version that is none": b"GET /health HTTP/7.3\r\nHost: x\r\n\r\n",
    "the oldest version": b"GET /health\r\n\r\n",
    "the preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0",
    "an upgrade to HTTP/2": HEAD
    + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAA\r\n\r\n",
    "an upgrade of a body": POST + b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 3\r\n\r\nabc",
    "an upgrade to a socket": HEAD + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n\x81\x05hello",
    "a hello of TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),
    "a folded header": HEAD + b"X-Y: a\r\n b\r\n\r\n",
    "a header without a colon": HEAD + b"nonsense\r\n\r\n",
    "a space before the colon": HEAD + b"X-Y : z\r\n\r\n",
    "line ends alone": b"GET /health HTTP/1.1\nHost: x\n\n",
    "returns alone": b"GET /health HTTP/1.1\rHost: x\r\r",
    "an expectation": POST + b"Expect: 100-continue\r\nContent-Length: 3\r\n\r\n",
    "another expectation": POST + b"Expect: miracles\r\nContent-Length: 3\r\n\r\nabc",
    "an expectation and no body": HEAD + b"Expect: 100-continue\r\n\r\n",
    "hundreds of requests at once": (HEAD + b"\r\n") * 500,
    "requests behind a faulty one": HEAD + b"X-\0: y\r\n\r\n" + (HEAD + b"\r\n") * 9,
    "requests behind a closing one": closing(HEAD) + (HEAD + b"\r\n") * 9,
    "empty lines": b"\r\n" * 50_000,
    "a body of nobody": HEAD + b"\r\n" + b"x" * 300_000,
}  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    running = Running(LIMITS)
    yield running
    running.stop()


def answered(server: Running, sent: bytes) -> list[int]:
    """The statuses of all answers until the server closes."""
    with server.open() as client:

        def send() -> None:
            with contextlib.suppress(OSError):  # refused in the meantime
                client.sendall(sent)

        sending = threading.Thread(target=send)
        sending.start()
        found = rest(client)
        sending.join()
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", found)]


@pytest.mark.parametrize("name", CASES)
def test_malformed_requests_end_and_are_no_defect(server, name, capfd, caplog):
    statuses = answered(server, CASES[name])
    assert all(status < 500 for status in statuses), statuses
    assert server.ask(closing(HEAD)).startswith(OK)
    server.wait(lambda: not len(server.server.connections))
    assert "Traceback" not in capfd.readouterr().err + caplog.text


def test_mutations_of_requests_end_and_are_no_defect(server, capfd, caplog):
    draw = random.Random(7)
    seeds = [CASES[name] for name in CASES if len(CASES[name]) < 1000]
    clients: list[socket.socket] = []
    for _ in range(300):
        made = bytearray(draw.choice(seeds))
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(len(made) or 1)
            match draw.randrange(3):
                case 0:
                    made[place : place + 1] = bytes([draw.randrange(256)])
                case 1:
                    made[place:place] = bytes(made[: draw.randrange(40)])
                case _:
                    del made[place : place + draw.randrange(9)]
        clients.append(server.open(bytes(made)))
    statuses = [int(status) for each in clients for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", rest(each))]
    for client in clients:
        client.close()
    assert len(statuses) > 100
    assert all(status < 500 for status in statuses)
    server.wait(lambda: not len(server.server.connections))
    assert server.ask(closing(HEAD)).startswith(OK)
    assert "Traceback" not in capfd.readouterr().err + caplog.text
