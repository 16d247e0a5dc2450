"""Connection of a client: bytes are counted before they are parsed, and every wait has a time limit."""

from __future__ import annotations

import asyncio
import enum
import json
import math
import resource
import select
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from httptools import HttpParserUpgrade
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from veneer.serve.http.errors import (
    BodyTooLargeError,
    BusyError,
    HeadTooLargeError,
    RefusedError,
    TooSlowError,
    error_body,
    retry_header,
)
from veneer.serve.schedule.return_places import ReturnPlaces

_FILES = 256  # descriptors that connections leave to adapters, libraries and logs
_MOST = 1 << 13  # connections, however many files may be open
_MOST_FILES = 1 << 16
_HUNG_UP = getattr(select, "POLLRDHUP", 0)  # Linux; ends and errors are told everywhere
_TURN = 15.0  # seconds in which all connections are thought to have their answers


@dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    """Limits of one connection, and of the number of connections.

    ``head_bytes``: size of the request line and headers. ``headers``: number of headers. ``head_seconds``: time to
    receive them. ``chunks``: number of chunks of a body, plus one for each ``chunk_bytes`` received. ``body_seconds``:
    time to receive a body, plus a second for each ``body_rate`` bytes received. ``unread_seconds``: time for the client
    to read a response, plus a second for each ``body_rate`` bytes read. ``linger_seconds``: time for a refused client
    to read the reason. ``idle_seconds``: time between two requests. ``connections``: number of open connections; if it
    is None, the process's limit of open files, less a reserve.
    """

    head_bytes: int = 1 << 16
    headers: int = 128
    chunks: int = 1 << 12
    chunk_bytes: int = 64
    head_seconds: float = 30.0
    body_seconds: float = 30.0
    body_rate: int = 1 << 14
    unread_seconds: float = 60.0
    linger_seconds: float = 5.0
    idle_seconds: float = 75.0
    connections: int | None = None


class Connections:
    """Open connections of a server.

    If there are too many, the connection with the longest unfinished request is closed. If none is unfinished, the
    longest idle one is closed. If all connections wait for answers, the new client is told to retry.
    """

    def __init__(self, limits: ConnectionLimits | None = None) -> None:
        self.limits = limits or ConnectionLimits()
        self.most = self.limits.connections or _most_connections()
        self.n_evicted = 0
        self._open: set[Connection] = set()
        self._owing: dict[Connection, None] = {}  # the one that has owed longest comes first
        self._idle: dict[Connection, None] = {}
        self._places = ReturnPlaces()

    def __len__(self) -> int:
        return len(self._open)

    def add(self, connection: Connection) -> bool:
        """Add a new connection; return False if there are too many and none can be closed."""
        if len(self._open) >= self.most and not self._evict():
            return False
        self._open.add(connection)
        self._owing[connection] = None
        return True

    def owes(self, connection: Connection) -> None:
        """Note that the client has yet to send the rest of a request."""
        self._idle.pop(connection, None)
        self._owing[connection] = None

    def rests(self, connection: Connection) -> None:
        """Note that the connection is idle."""
        self._owing.pop(connection, None)
        self._idle[connection] = None

    def works(self, connection: Connection) -> None:
        """Note that the client waits for an answer."""
        self._owing.pop(connection, None)
        self._idle.pop(connection, None)

    def remove(self, connection: Connection) -> None:
        """Forget a connection that is closed."""
        self.works(connection)
        self._open.discard(connection)

    def refusal(self) -> BusyError:
        """Return the error for a client beyond the limit of connections, with the seconds after which it may retry."""
        seconds = self._places.seconds(1, self.most, lambda ahead: 1 + _TURN * ahead / self.most)
        return BusyError(
            f"this server has {self.most} connections, and all wait for answers: ask again in {math.ceil(seconds)} s",
            retry_seconds=seconds,
        )

    def check(self) -> None:
        """Close the connections that have timed out."""
        for connection in list(self._open):
            connection.check()

    def _evict(self) -> bool:
        for kind in (self._owing, self._idle):
            if kind:
                connection = next(iter(kind))
                self.remove(connection)
                self.n_evicted += 1
                connection.abort()
                return True
        return False


class _Reads(enum.Enum):
    """Part of a request that is being read."""

    NOTHING = 0
    HEAD = 1
    BODY = 2
    REFUSED = 3


class Connection(HttpToolsProtocol):
    """Uvicorn's connection within `ConnectionLimits`. Responses to HTTP/1.0 clients are not chunked."""

    def __init__(self, *args: Any, connections: Connections, **options: Any) -> None:
        super().__init__(*args, **options)
        self._connections, self._limits = connections, connections.limits
        self._app = self.app
        self._reads, self._since = _Reads.HEAD, self.loop.time()
        self._n_silent = 0  # bytes since the last that were a head or a part of a body
        self._n_headers = self._n_body = self._n_chunks = 0
        self._is_heard = self._has_begun = self._is_early = False
        self._unread: tuple[float, int] | None = None  # since when, and how many bytes then
        self._why: RefusedError | None = None
        self._piece = self._plain_head = b""  # bytes that are parsed, and a head without its wish for another protocol
        self._cycles = list[Any]()  # uvicorn's name of requests with their answers: those that are not answered

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        if not self._connections.add(self):
            self._reads = _Reads.REFUSED
            transport.write(_refusal(self._connections.refusal()))
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection, and end its answers."""
        self._connections.remove(self)
        self._leave()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse bytes. Refuse a head beyond its size limit."""
        self._has_begun = True
        while data and self._reads is not _Reads.REFUSED and self.parser is not None:
            room = self._limits.head_bytes + 1 - self._n_silent
            if self._reads is _Reads.BODY or len(data) <= room:
                piece, data = data, b""
            else:
                piece, data = data[:room], data[room:]
            self._is_heard, self._piece = False, piece
            super().data_received(piece)
            if self._plain_head:
                data, self._plain_head = self._plain_head + self._piece + data, b""
            self._n_silent = 0 if self._is_heard else self._n_silent + len(piece)
            if self._n_silent > self._limits.head_bytes:
                self._refuse(
                    HeadTooLargeError(
                        f"the request's address and headers have more than {self._limits.head_bytes} bytes: send less"
                    )
                )

    def on_message_begin(self) -> None:
        """Begin the head of a request."""
        super().on_message_begin()
        self._begin(_Reads.HEAD)
        self._n_headers = 0
        if self._is_free:
            self._connections.owes(self)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Handle a request's header that the parser found. Headers after a body are counted and ignored."""
        self._n_headers += 1
        if self._n_headers > self._limits.headers:
            self._why = HeadTooLargeError(f"the request has more than {self._limits.headers} headers: send fewer")
            raise self._why  # ends the parser
        if self._reads is _Reads.HEAD:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Call the application. If the client asks to switch to another protocol, parse the head again without that
        request.
        """
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            self._is_heard, self._plain_head = True, self._head_without_upgrade()
            return
        self._begin(_Reads.BODY)
        self._n_body = self._n_chunks = 0
        self._is_heard, self._is_early = True, False
        self.app = self._app if self.parser.get_http_version() == "1.1" else self._answer_without_chunks
        super().on_headers_complete()
        self._cycles.append(self.cycle)

    def on_chunk_header(self) -> None:
        """Count a chunk of the body: each one costs time, however short it is."""
        self._is_heard = True
        self._n_chunks += 1
        limits = self._limits
        if self._n_chunks > limits.chunks + self._n_body // limits.chunk_bytes:
            self._why = BodyTooLargeError(
                f"the body came in {self._n_chunks} chunks, most of them below {limits.chunk_bytes} bytes: send longer "
                "chunks, or send a Content-Length"
            )
            raise self._why  # ends the parser

    def on_body(self, body: bytes) -> None:
        """Handle a part of a request's body that the parser found."""
        self._n_body += len(body)
        self._is_heard = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Note that the whole request has been received, and wait for the answer."""
        if self._plain_head:
            return
        self._begin(_Reads.NOTHING)
        self._is_heard, self._is_early = True, False
        if self._is_free:  # answered before its body had come
            self._connections.rests(self)
        else:
            self._connections.works(self)
        super().on_message_complete()

    def _head_without_upgrade(self) -> bytes:
        line = b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        lines = [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join([line, *lines, b"", b""])

    def _unsupported_upgrade_warning(self) -> None:
        """Keep the bytes after a head that asks for another protocol, since the parser takes no body then.

        Java's client asks for HTTP/2 in each request, which this server does not speak.
        """
        stopped = sys.exception()
        if isinstance(stopped, HttpParserUpgrade):
            self._piece = self._piece[stopped.args[0] :]

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        self._cycles = [cycle for cycle in self._cycles if not cycle.response_complete]
        if not self.transport.is_closing() and self._is_free:
            if self._reads is _Reads.NOTHING:
                self._begin(_Reads.NOTHING)
                self._connections.rests(self)
            else:
                self._is_early = True
                self._connections.owes(self)

    def send_400_response(self, msg: str) -> None:
        """Refuse a request that cannot be parsed."""
        self._refuse(self._why or RefusedError("this is not a valid HTTP request: correct it and send it again"))

    def pause_writing(self) -> None:
        """Note the time since when the client has unread bytes."""
        self._unread = self.loop.time(), self.transport.get_write_buffer_size()
        super().pause_writing()

    def resume_writing(self) -> None:
        """Note that the client has read the bytes that it had left unread."""
        self._unread = None
        super().resume_writing()

    def check(self) -> None:
        """Close the connection if its client takes too long, or has disconnected while the server reads nothing from
        it.
        """
        now = self.loop.time()
        if self.transport.is_closing() and self._unread is None:
            self._unread = now, self.transport.get_write_buffer_size()
        if self._is_unread(now):
            self.abort()
        elif self.flow.read_paused:
            self._since = now  # it is not the client that makes this wait
            if not self._is_free and not self.transport.is_closing() and self._has_hung_up:
                self.abort()
        elif now > self._since + self._seconds:
            self._end()

    def abort(self) -> None:
        """Close at once."""
        self._leave()
        self.transport.abort()

    def _leave(self) -> None:
        """Tell the application that the client has gone."""
        for cycle in self._cycles:
            cycle.disconnected = True
            cycle.message_event.set()

    def _is_unread(self, now: float) -> bool:
        """Return True if the client takes too long to read."""
        if self._unread is None:
            return False
        since, n = self._unread
        n_read = n - self.transport.get_write_buffer_size()
        return now > since + self._limits.unread_seconds + n_read / self._limits.body_rate

    @property
    def _has_hung_up(self) -> bool:
        """Return True if the client has closed the connection, also if bytes before its end are not read yet."""
        looked = select.poll()
        looked.register(self.transport.get_extra_info("socket").fileno(), _HUNG_UP)
        return bool(looked.poll(0))

    @property
    def _seconds(self) -> float:
        """Return the seconds that a client has to send the part that is being read."""
        match self._reads:
            case _Reads.REFUSED:
                return self._limits.linger_seconds
            case _Reads.HEAD:
                return self._limits.head_seconds
            case _Reads.BODY:
                return self._limits.body_seconds + self._n_body / self._limits.body_rate
        return self._limits.idle_seconds if self._is_free else math.inf

    @property
    def _is_free(self) -> bool:
        """Return True if no answer is awaited."""
        return not self._cycles

    def _begin(self, reads: _Reads) -> None:
        self._reads, self._since = reads, self.loop.time()

    def _end(self) -> None:
        """End a connection that has timed out. A request that has begun gets an answer."""
        if self._reads is _Reads.REFUSED:
            self.abort()
        elif self._reads is _Reads.NOTHING or not self._has_begun:
            self.transport.close()
        else:
            part = "headers" if self._reads is _Reads.HEAD else "body"
            seconds = self._seconds
            self._refuse(TooSlowError(f"the request's {part} did not come within {seconds:.3g} s: send it again"))

    def _refuse(self, error: RefusedError) -> None:
        """Answer with an error, and close once the client has read it. If an answer has begun, close at once."""
        if self._reads is _Reads.REFUSED:
            return
        waiting = self._cycles
        is_answered = len(waiting) > 1 or waiting[0].response_started if waiting else self._is_early
        self._begin(_Reads.REFUSED)
        if is_answered:
            self.abort()
            return
        self._leave()
        self._unset_keepalive_if_required()
        self._connections.owes(self)
        self.transport.write(_refusal(error))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        else:
            self.transport.close()

    async def _answer_without_chunks(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a client of HTTP/1.0: the connection's end marks the end of a body without a length."""
        cycle: Any = getattr(send, "__self__")  # noqa: B009 - a method of the cycle, as uvicorn gives it
        is_open = False

        async def told(message: Message) -> None:
            nonlocal is_open
            if message["type"] == "http.response.start":
                is_open = not any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
                cycle.chunked_encoding = False if is_open else None
            elif is_open:
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await self._app(scope, receive, told)


def _refusal(error: RefusedError) -> bytes:
    body = json.dumps(error_body(error)).encode()
    headers: Iterable[tuple[str, object]] = [
        ("content-type", "application/json"), ("content-length", len(body)), ("connection", "close"),
        *retry_header(error).items(),
    ]  # fmt: skip
    told = "".join(f"{name}: {value}\r\n" for name, value in headers)
    return STATUS_LINE[error.status] + told.encode() + b"\r\n" + body


def allow_files() -> None:
    """Raise this process's soft limit of open files to the hard limit, but at most to `_MOST_FILES`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _most_connections() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    n_files = _MOST_FILES if soft == resource.RLIM_INFINITY else soft
    return max(1, min(_MOST, n_files - min(_FILES, n_files // 2)))


def made(connections: Connections) -> Callable[..., Connection]:
    """Return the function that uvicorn calls to create a connection; each one is counted in ``connections``."""
    return lambda *args, **options: Connection(*args, connections=connections, **options)
