"""Application in front of several replicas: it checks a request's key, and forwards it to a replica by its adapter.

No Ray.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Protocol

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse, Response
from prometheus_client.metrics_core import Metric as Family
from pydantic_core import from_json
from starlette.types import Message, Receive, Scope, Send

from veneer.errors import VeneerError
from veneer.serve.http.access import Access, scopes_of
from veneer.serve.http.call import Call
from veneer.serve.http.errors import (
    RefusedError,
    RetryLaterError,
    error_body,
    message_error,
    on_defect,
    on_veneer_error,
)
from veneer.serve.http.key import ADMIN, CALLER
from veneer.serve.http.key_file import Keys
from veneer.serve.http.limits import BodyLimit
from veneer.serve.http.metrics import CONTENT_TYPE, text_of
from veneer.serve.http.request_record import HEADER, RequestRecords, current_record
from veneer.serve.http.server_limits import ServerLimits

_ID = HEADER.lower().encode()
_TAKEN_SECONDS = 10.0  # for a replica to take a request
RETRY_SECONDS = 5
"""Time after which another replica is asked; a new one takes as long as its model."""
_LARGE = 1 << 16  # bytes of a body that is not read on the loop
_ADAPTERS = "/v1/adapters/"
_LONGEST = 256  # characters of a name by which a replica is chosen: routers remember names


class ReplicaLostError(RetryLaterError):
    """Error for a request whose replica ended while it was in flight, or that no replica accepts."""

    status = 503


class Replicas(Protocol):
    """Replicas that answer calls."""

    def answer(self, call: Call) -> AsyncGenerator[Message, None]:
        """Yield `veneer.serve.http.call.TAKEN` once a replica has the call, and then the messages of its response.

        Raises ReplicaLostError if that replica ends.
        """

    async def metrics(self) -> Sequence[Sequence[Family]]:
        """Return the metrics of each replica."""


def make_ingress(
    replicas: Replicas, base: Collection[str], limits: ServerLimits | None = None, keys: Keys | None = None
) -> FastAPI:
    """Return the application in front of replicas, each a `make_app`. ``base``: the names of the base.

    Keys have the same effect as on a replica; without keys, all clients are allowed. ``/health`` is about this process
    alone. ``/metrics`` has the metrics of all replicas. Routes that change the adapters of one replica are refused. A
    replica answers all other routes.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if keys is not None:
            keys.start()
        yield
        if keys is not None:
            await asyncio.to_thread(keys.stop)

    async def health() -> Response:
        """Return 200: this process runs. ``/ready`` asks a replica."""
        return Response()

    async def metrics() -> Response:
        """Return the metrics of all replicas, told apart by the label ``engine``."""
        return Response(text_of(await replicas.metrics(), CALLER.get()), headers={"Content-Type": CONTENT_TYPE})

    app = FastAPI(title="veneer", lifespan=lifespan, openapi_url=None)  # the replicas have the documentation
    app.add_middleware(BodyLimit, most=(limits or ServerLimits()).body_bytes)
    app.add_middleware(Access, keys=keys, is_open=True)  # the address is that of Ray's proxies
    app.add_middleware(RequestRecords)  # outside all others
    app.add_exception_handler(VeneerError, on_veneer_error)
    app.add_exception_handler(Exception, on_defect)
    app.get("/health")(health)
    app.get("/metrics", response_class=PlainTextResponse)(metrics)
    app.mount("/", Forward(replicas, base))
    return app


class Forward:
    """Application that forwards each request to a replica, chosen by the adapter that the request names."""

    def __init__(self, replicas: Replicas, base: Collection[str]) -> None:
        self._replicas, self._base = replicas, frozenset(base)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request.

        Raises ReplicaLostError if the replica is lost or none accepts the request. If a stream of events has begun, it
        sends an error event instead.
        """
        _require_of_all(scope["method"], scope["path"])
        call = await self._call(scope, receive)
        held, is_stream = list[Message](), False
        try:
            async for message in self._messages(call):
                held.append(without_id(message))
                if message["type"] == "http.response.start":
                    is_stream = _is_stream(message)
                    if not is_stream:
                        continue  # until the body is there: without one the status is another
                for each in held:
                    await send(each)
                held.clear()
        except ReplicaLostError as error:
            if not is_stream:
                raise
            await send({"type": "http.response.body", "body": _last_event(call.path, error), "more_body": False})

    async def _messages(self, call: Call) -> AsyncGenerator[Message, None]:
        """Yield the messages of a response, once a replica has the request."""
        async with aclosing(self._replicas.answer(call)) as messages:
            try:
                await asyncio.wait_for(anext(messages), _TAKEN_SECONDS)  # `TAKEN`
            except TimeoutError as error:
                raise ReplicaLostError(
                    f"no replica takes requests now: ask again in {RETRY_SECONDS} s",
                    retry_seconds=RETRY_SECONDS,
                ) from error
            async for message in messages:
                yield message

    async def _call(self, scope: Scope, receive: Receive) -> Call:
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        path, name = scope["path"], None
        if body:
            name = await asyncio.to_thread(self.name, body) if len(body) > _LARGE else self.name(body)
        elif path.startswith(_ADAPTERS):
            name = path.removeprefix(_ADAPTERS)
        if name is not None and len(name) > _LONGEST:
            name = None
        headers = [(key, value) for key, value in scope["headers"] if key != _ID]
        return Call(
            name=name, method=scope["method"], path=path, query=scope["query_string"], client=scope["client"],
            headers=[*headers, (_ID, current_record().id.encode())], body=body,
        )  # fmt: skip

    def name(self, body: bytes) -> str | None:
        """Return the name of the adapter, or of the mix, that a body asks for; None for the base.

        Return None for an invalid body too, because the replica reports the error.
        """
        try:
            given = from_json(body)
        except ValueError:
            return None
        if not isinstance(given, dict):
            return None
        mix, model = given.get("adapter"), given.get("model")
        if isinstance(mix, dict) and mix:
            return json.dumps(mix, sort_keys=True)
        return model if isinstance(model, str) and model not in self._base else None


def _require_of_all(method: str, path: str) -> None:
    """Raise RefusedError for a route that would change the adapters of one process only."""
    if path.startswith("/v1/") and ADMIN in scopes_of(method, path) and method not in ("GET", "HEAD"):
        raise RefusedError(
            f"{method} {path!r} changes the adapters of one process, and this server has several: copy the adapter "
            "into the folder of adapters, or remove it there. Each replica watches that folder."
        )


def without_id(message: Message) -> Message:
    """Return a message without the request's id, which an outer application adds."""
    if message["type"] != "http.response.start":
        return message
    return {**message, "headers": [(key, value) for key, value in message["headers"] if key.lower() != _ID]}


def _is_stream(message: Message) -> bool:
    kinds = [value for key, value in message.get("headers", ()) if key.lower() == b"content-type"]
    return any(kind.startswith(b"text/event-stream") for kind in kinds)


def _last_event(path: str, error: VeneerError) -> bytes:
    """Return the last event of a stream that is cut off, in its route's format."""
    if path.startswith("/v1/messages"):
        return f"event: error\ndata: {json.dumps(message_error(error))}\n\n".encode()
    if path.startswith("/v1/responses"):
        told = {"type": "error", "code": "server_error", "message": str(error), "param": None}
        return f"event: error\ndata: {json.dumps(told)}\n\n".encode()
    return f"data: {json.dumps(error_body(error))}\n\ndata: [DONE]\n\n".encode()
