"""Refusal of a body that is too large."""

from __future__ import annotations

from collections import deque

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from veneer.serve.http.errors import BodyTooLargeError, error_body

_MOST_BRACKETS = 1 << 18  # of lists and objects: more are made, and freed, in no less than 20 ms without a pause
_DRAINED = 16  # times the limit: no more of a body that is refused is read


class BodyLimit:
    """Middleware that refuses bodies of more than ``most`` bytes, and buffers no more than that.

    It also refuses bodies with more than `_MOST_BRACKETS` opening brackets, in strings too.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        read: deque[Message] = deque()
        told = _told(scope)
        n_bytes = told if told > self._most else await _read(receive, read, self._most)
        if n_bytes <= self._most:
            n_brackets = _n_brackets(read)
            if n_brackets <= _MOST_BRACKETS:
                await self._app(scope, _again(read, receive), send)
                return
            error = BodyTooLargeError(
                f"the body has {n_brackets} opening brackets ([ and {{, those in texts too) and this server takes "
                f"{_MOST_BRACKETS}: send fewer lists and objects at once"
            )
            await JSONResponse(error_body(error), error.status)(scope, receive, send)
            return
        at_least = "at least " if n_bytes > max(told, _DRAINED * self._most) else ""
        error = BodyTooLargeError(
            f"the body has {at_least}{n_bytes} bytes and this server takes {self._most}: send less at once, or raise "
            "its --max-body-mib"
        )
        close = {"Connection": "close"} if n_bytes > _DRAINED * self._most else None
        await JSONResponse(error_body(error), error.status, close)(scope, receive, send)


def _told(scope: Scope) -> int:
    """Return the body's size in bytes according to the header Content-Length; 0 if there is none."""
    told = Headers(scope=scope).get("content-length", "")
    return int(told) if told.isdecimal() else 0


async def _read(receive: Receive, read: deque[Message], most: int) -> int:
    """Read a body into ``read``, and return its size. If it has more than ``most`` bytes, ``read`` stays empty.

    A client reads the refusal only after it has sent its body. A larger body is therefore read to its end, up to
    `_DRAINED` times ``most``.
    """
    n_bytes, more = 0, True
    while more and n_bytes <= _DRAINED * most:
        message = await receive()
        n_bytes += len(message.get("body", b""))
        more = message["type"] == "http.request" and message.get("more_body", False)
        if n_bytes > most:
            read.clear()
        else:
            read.append(message)
    return n_bytes


def _n_brackets(read: deque[Message]) -> int:
    return sum(message.get("body", b"").count(bracket) for message in read for bracket in (b"[", b"{"))


def _again(read: deque[Message], receive: Receive) -> Receive:
    """Return an ASGI receive function that returns the messages already read, and then new ones."""

    async def next_message() -> Message:
        return read.popleft() if read else await receive()

    return next_message
