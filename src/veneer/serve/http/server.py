"""Server process, with a shutdown that notifies every client."""

from __future__ import annotations

import asyncio
import logging
import signal
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from veneer.serve.http.connection import ConnectionLimits, Connections, allow_files, made
from veneer.serve.http.listening import require_free

_LOG = logging.getLogger("uvicorn.error")  # of the server, whose lines go to stderr
_CUT_OFF_SECONDS = 2.0  # for a client to read what is left; cut off later than that
_GRACE_SECONDS = 3
_TICKS = 10  # of 0.1 s, after which connections are looked at


def run(app: FastAPI, host: str, port: int, drain_seconds: float, **how: Any) -> None:
    """Serve until a signal. SIGINT raises KeyboardInterrupt; SIGTERM ends the process.

    Raises ConfigError if the port is in use.
    """
    allow_files()
    for sandbox in app.state.sandboxes:
        sandbox.warm()
    try:
        Server(app, drain_seconds, host=host, port=port, **how).run()
    except SystemExit:
        require_free(host, port)
        raise
    raise KeyboardInterrupt  # it came to a process that ignored it before, as shells start them in the background


class Server(uvicorn.Server):
    """Uvicorn server of an application of `make_app`.

    SIGTERM makes it drain: new requests are refused, and requests in flight have ``drain_seconds`` to end. A second
    signal, or SIGINT, stops the server at once. Requests still in flight then end with an error. Connections are within
    ``limits``.
    """

    def __init__(
        self, app: FastAPI, drain_seconds: float = 0.0, limits: ConnectionLimits | None = None, **options: Any
    ) -> None:
        self.connections = Connections(limits)
        kind: Any = made(self.connections)
        config = uvicorn.Config(
            app, log_level="warning", timeout_graceful_shutdown=_GRACE_SECONDS, http=kind, ws="none",
            timeout_keep_alive=self.connections.limits.idle_seconds,  # type: ignore[arg-type]  # it takes fractions
            **options,
        )  # fmt: skip
        super().__init__(config)
        self._engine, self._lifecycle, self._drain_seconds = app.state.engine, app.state.lifecycle, drain_seconds
        self._has_told = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal: begin to drain on the first SIGTERM, and stop on any other signal."""
        if sig == signal.SIGTERM and not self._lifecycle.is_draining and not self.should_exit:
            self._lifecycle.drain(self._drain_seconds)
        else:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """Close connections that have timed out. Return True once the server is drained."""
        if counter % _TICKS == 0:
            self.connections.check()
        if self._lifecycle.is_draining and not self._has_told:
            self._has_told = True
            if self._lifecycle.n_in_flight:
                told = "stopping: requests in flight (%d) have %g s to end; a second signal ends them at once"
                _LOG.warning(told, self._lifecycle.n_in_flight, self._drain_seconds)
            else:
                _LOG.warning("stopping: no request is in flight")
        if self._lifecycle.is_drained and not self.should_exit:
            super().handle_exit(signal.SIGTERM, None)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: Any = None) -> None:
        """End every request with an error that gives the reason, and disconnect clients that do not read it."""
        n_ended = self._engine.end_all()
        if n_ended:
            _LOG.warning("stopping: requests in flight (%d) ended with an error that gives this reason", n_ended)
        asyncio.get_running_loop().call_later(_CUT_OFF_SECONDS, self._cut_off)
        await super().shutdown(sockets)

    def _cut_off(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()
