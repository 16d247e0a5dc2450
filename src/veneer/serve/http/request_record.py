"""Record of a request: its id, its token counts, and one line of the log when it has ended. It never holds text."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sys
import time
import uuid
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from veneer.errors import ServingError
from veneer.serve.async_engine import AsyncEngine
from veneer.serve.requests.checked import CheckedRequest
from veneer.serve.schedule.outputs import RequestOutput

GONE = 499  # nobody reads the answer: the client has closed the connection
HEADER = "X-Request-Id"
IGNORED = "X-Ignored-Fields"
LOG = logging.getLogger(__name__)
_ID = re.compile(r"[A-Za-z0-9._:/+=@~-]{1,128}")
# Asked for by probes, routers and open pages every few seconds: no line while all is well.
_POLLED = frozenset({"/", "/health", "/ready", "/metrics", "/v1/adapters", "/v1/models"})
_ANTHROPICS = "/v1/messages"  # routes whose errors have Anthropic's form
_ANTHROPICS_HEADER = "Request-Id"  # where its clients look for the id
_LONGEST_PATH = 128  # characters of a path that is no route's


@dataclass(slots=True)
class RequestRecord:
    """Facts of one request. Times are by `time.perf_counter`, 0 for events that have not happened.

    ``model`` is None until a known model is requested. ``client`` is None without a key. ``status`` is the response's
    HTTP status; `GONE` if the client disconnected before its end. ``is_anthropics``: errors have Anthropic's form.
    """

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    is_anthropics: bool = False
    began: float = field(default_factory=time.perf_counter)
    model: str | None = None
    client: str | None = None
    status: int = GONE
    n_prompt: int = 0
    scheduled: float = 0.0
    first: float = 0.0
    drawn: dict[str, int] = field(default_factory=dict)
    """Tokens of the answers to each prompt."""
    cached: dict[str, int] = field(default_factory=dict)
    """Tokens of each prompt that were in the prefix cache."""
    reasons: set[str] = field(default_factory=set)
    """Finish reasons of the answers that have ended."""
    ignored: list[str] = field(default_factory=list)
    """Fields of the body that change nothing. A response header names them."""

    def ask(self, asked: Sequence[CheckedRequest]) -> None:
        """Count the tokens of prompts that are given to the engine."""
        self.n_prompt += sum(len(each.prompt_ids) for each in asked)

    def take(self, output: RequestOutput) -> None:
        """Count the new tokens in an output of the engine."""
        n = sum(len(answer.token_ids) for answer in output.outputs)
        self.drawn[output.request_id] = self.drawn.get(output.request_id, 0) + n
        self.cached[output.request_id] = output.num_cached_tokens
        if output.finished:
            self.reasons |= {answer.finish_reason for answer in output.outputs if answer.finish_reason}
        if not self.first and n:
            self.first = time.perf_counter()
        if output.metrics is not None:
            self.scheduled = _earliest(self.scheduled, output.metrics.scheduled_ts)
            self.first = _earliest(self.first, output.metrics.first_token_ts)

    def abandon(self, drawn: Mapping[str, int]) -> None:
        """Set the number of tokens generated for each aborted request, whether or not they were returned."""
        self.drawn |= {id: max(n, self.drawn.get(id, 0)) for id, n in drawn.items()}

    def line(self, scope: Scope) -> str:
        """Return the line of the log, as JSON."""
        route, peer = scope.get("route"), scope.get("client")
        told: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"), "id": self.id, "method": scope["method"],
            "route": scope["path"][:_LONGEST_PATH] if route is None else route.path, "model": self.model,
            "client": self.client, "peer": peer and peer[0], "status": self.status,
            "finish_reasons": sorted(self.reasons), "ignored": self.ignored,
            "tokens_in": self.n_prompt, "tokens_out": sum(self.drawn.values()),
            "tokens_cached": sum(self.cached.values()),
            "seconds_waited": self._since(self.scheduled), "seconds_to_first_token": self._since(self.first),
            "seconds": self._since(time.perf_counter()),
        }  # fmt: skip
        return json.dumps(told)

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the headers of the response."""
        told = {HEADER: self.id} | ({_ANTHROPICS_HEADER: self.id} if self.is_anthropics else {})
        told |= {IGNORED: ", ".join(self.ignored)} if self.ignored else {}
        return [(name.lower().encode(), value.encode()) for name, value in told.items()]

    def _since(self, then: float) -> float | None:
        return round(then - self.began, 6) if then else None


class RequestRecords:
    """Middleware that keeps a record of each request. It is the outermost one, so that every response has an id."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = _record_of(Headers(scope=scope).get(HEADER))
        record.is_anthropics = scope["path"].startswith(_ANTHROPICS)
        _current.set(record)
        sent = GONE

        async def with_id(message: Message) -> None:
            nonlocal sent
            if message["type"] == "http.response.start":
                sent = message["status"]
                message["headers"] = [*message.get("headers", ()), *record.headers()]
            elif not message.get("more_body", False):
                record.status = sent
            await send(message)

        try:
            await self._app(scope, receive, with_id)
        except Exception:
            record.status = 500
            raise
        finally:
            is_dull = scope["method"] in ("GET", "HEAD") and scope["path"] in _POLLED and record.status < 400
            if not is_dull and LOG.isEnabledFor(logging.INFO):
                LOG.info(record.line(scope))


class RecordedEngine(AsyncEngine):
    """Engine that counts its answers in the record of the current request."""

    async def batches(self, asked: Sequence[CheckedRequest]) -> AsyncGenerator[list[RequestOutput], None]:
        """Yield the outputs of requests as `AsyncEngine.batches` does."""
        record, left = current_record(), {each.id for each in asked}
        record.ask(asked)
        try:
            async with aclosing(super().batches(asked)) as batches:
                async for batch in batches:
                    for output in batch:
                        record.take(output)
                        left -= {output.request_id} if output.finished else set()
                    yield batch
        except (GeneratorExit, asyncio.CancelledError, ServingError):
            record.reasons |= {"abort"} if left else set()
            raise

    def abandon(self, request_ids: Collection[str]) -> None:
        """End requests, and count the tokens generated so far."""
        current_record().abandon({id: self.engine.n_drawn(id) for id in request_ids})
        super().abandon(request_ids)


_current: ContextVar[RequestRecord] = ContextVar("record")


def current_record() -> RequestRecord:
    """Return the record of the current request; outside of a request, a new one that is never read."""
    return _current.get(None) or RequestRecord()


def log_requests() -> None:
    """Write the lines of the log to stderr, and to no other log."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    LOG.propagate = False


def _record_of(given: str | None) -> RequestRecord:
    """Return a record with the client's request id if the id is short and plain. Otherwise the record has a new id."""
    return RequestRecord(given) if given and _ID.fullmatch(given) else RequestRecord()


def _earliest(known: float, then: float) -> float:
    return min(filter(None, (known, then)), default=0.0)
