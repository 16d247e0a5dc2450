"""Life of a server: ready while its engine runs, draining before it stops; and the routes that report it."""

from __future__ import annotations

import importlib.metadata
import math
from time import monotonic
from typing import Literal

from fastapi import FastAPI
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.types import ASGIApp, Receive, Scope, Send

from veneer.serve.async_engine import AsyncEngine
from veneer.serve.http.documented import documented, empty
from veneer.serve.http.errors import RetryLaterError, error_response
from veneer.serve.http.lanes import Lanes

_ALWAYS = frozenset({"/health", "/ready", "/version", "/metrics"})  # answered while the server drains


class NotReadyError(RetryLaterError):
    """Error for a request to a server that accepts none now."""

    status = 503


class Readiness(BaseModel):
    """Answer of a server that takes requests. ``stuck``: number of threads beyond their time limit, by lane."""

    ready: Literal[True] = True
    stuck: dict[str, int]


class Lifecycle:
    """State of a server. After `drain`, requests in flight may end, and new requests are refused."""

    def __init__(self, engine: AsyncEngine, lanes: Lanes | None = None) -> None:
        self._engine, self._lanes = engine, lanes or Lanes()
        self.n_in_flight = 0
        self._drained_at = math.inf

    @property
    def is_draining(self) -> bool:
        """True after `drain`."""
        return self._drained_at < math.inf

    @property
    def is_drained(self) -> bool:
        """True if, after `drain`, no request is in flight or the time is over."""
        return self.is_draining and (not self.n_in_flight or monotonic() >= self._drained_at)

    def drain(self, seconds: float) -> None:
        """Refuse new requests. Those in flight have ``seconds`` to end."""
        self._drained_at = monotonic() + seconds

    def require_open(self) -> None:
        """Raise NotReadyError while the server drains."""
        if self.is_draining:
            left = max(1, math.ceil(self._drained_at - monotonic()))
            raise NotReadyError(f"this server is stopping: ask another one, or ask again in {left} s", None, left)

    def require_ready(self) -> None:
        """Raise NotReadyError, with the reason, unless the engine runs and requests are accepted."""
        self.require_open()
        if self._engine.failure is not None:
            kind = type(self._engine.failure).__name__
            raise NotReadyError(f"the engine has broken down: {kind}. Its log has the rest. Restart this server.")
        if not self._engine.is_running:
            raise NotReadyError("the engine does not run yet: ask again later")
        if self._lanes.prompts.is_blocked:
            n = self._lanes.prompts.n_stuck
            raise NotReadyError(f"all {n} threads that read prompts are stuck: restart this server if that lasts")

    @property
    def stuck(self) -> dict[str, int]:
        """Number of threads of each lane that are beyond their time limit."""
        return self._lanes.stuck


class Gate:
    """Middleware that counts the requests in flight, and refuses new ones while the server drains."""

    def __init__(self, app: ASGIApp, lifecycle: Lifecycle) -> None:
        self._app, self._lifecycle = app, lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or scope["path"] in _ALWAYS:
            await self._app(scope, receive, send)
            return
        try:
            self._lifecycle.require_open()
        except NotReadyError as error:
            await error_response(error, {"Connection": "close"})(scope, receive, send)
            return
        self._lifecycle.n_in_flight += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._lifecycle.n_in_flight -= 1


def add_lifecycle(app: FastAPI, lifecycle: Lifecycle, engine: AsyncEngine) -> None:
    """Add the routes ``/health``, ``/ready`` and ``/version``."""

    async def health() -> Response:
        """Return 200 while the engine runs, 500 with the reason once it has broken down."""
        engine.require_whole()
        return Response()

    async def ready() -> Readiness:
        """Return 200 while requests are taken; else 503 with the reason: starting, stopping, broken down, or stuck."""
        lifecycle.require_ready()
        return Readiness(stuck=lifecycle.stuck)

    async def version() -> dict[str, str]:
        """Return the version of veneer."""
        return {"version": importlib.metadata.version("veneer")}

    app.get("/health", **empty(500))(health)
    app.get("/ready", **documented(Readiness, body=False))(ready)
    app.get("/version")(version)
