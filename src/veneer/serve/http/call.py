"""Request to a replica: an ASGI request as plain values, and the messages of its response. No Ray."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope

TAKEN: Message = {"type": "veneer.taken"}
"""First message of every call: a replica has accepted it."""
_LOG = logging.getLogger("uvicorn.error")  # of the server, whose lines go to stderr


@dataclass(frozen=True, kw_only=True)
class Call:
    """Request with its whole body, as plain values.

    ``name`` chooses the replica; if it is None, any replica may answer.
    """

    name: str | None
    method: str
    path: str
    query: bytes
    headers: Sequence[tuple[bytes, bytes]]
    client: tuple[str, int] | None
    body: bytes

    def scope(self) -> Scope:
        """Return the call as an ASGI scope."""
        return {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "root_path": "",
            "method": self.method, "path": self.path, "raw_path": quote(self.path, errors="replace").encode(),
            "query_string": self.query, "headers": list(self.headers), "client": self.client, "server": None,
        }  # fmt: skip


async def answered(app: ASGIApp, call: Call) -> AsyncGenerator[Message, None]:
    """Yield the message `TAKEN`, and then the messages of an application's response as they come.

    If the generator is closed, the application is cancelled as if the client had disconnected.
    """
    yield TAKEN
    told: asyncio.Queue[Message | None] = asyncio.Queue()
    task = asyncio.ensure_future(app(call.scope(), _receive(call.body), told.put))
    task.add_done_callback(lambda _: told.put_nowait(None))
    try:
        while (message := await told.get()) is not None:
            yield message
        if not task.cancelled() and task.exception() is not None:  # the response has told it, the log has the rest
            _LOG.error("%s %s met a defect", call.method, call.path, exc_info=task.exception())
    finally:
        task.cancel()
        await asyncio.wait([task])


def _receive(body: bytes) -> Receive:
    """Return an ASGI receive function. Its first call returns the body; later calls wait until the client leaves."""
    left = [body]

    async def receive() -> Message:
        while not left:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": left.pop(), "more_body": False}

    return receive
