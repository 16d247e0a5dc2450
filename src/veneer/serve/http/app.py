"""Application: its routes, and an engine that runs as long as it does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from veneer.errors import ConfigError, VeneerError
from veneer.serve.asked import Asked
from veneer.serve.calls import Calls
from veneer.serve.engine import Engine
from veneer.serve.http import chat, completions
from veneer.serve.http.answers import Answering, Shape, stream_of, whole_answer
from veneer.serve.http.errors import (
    RefusedError,
    TooManyRequestsError,
    on_defect,
    on_invalid_body,
    on_unknown_route,
    on_veneer_error,
)
from veneer.serve.http.lifecycle import Gate, Lifecycle, add_lifecycle
from veneer.serve.http.limits import BodyLimit, ServerLimits
from veneer.serve.http.metrics import add_metrics
from veneer.serve.http.models import Catalogue
from veneer.serve.http.page import add_page
from veneer.serve.http.protocol import Body, ChatBody, CompletionBody, StreamOptions
from veneer.serve.http.request_record import RecordedEngine, RequestRecords, current_record
from veneer.serve.lora_request import LoRARequest


def make_app(
    engine: Engine, catalogue: Catalogue, limits: ServerLimits | None = None, *, metrics_prefix: str = "veneer"
) -> FastAPI:
    """Return OpenAI's completions, chat completions and models over an engine, which steps on its own thread."""
    limits = limits or ServerLimits()
    api = Api(engine, catalogue, limits)
    app = FastAPI(title="veneer", lifespan=api.lifespan)
    lifecycle = Lifecycle(api.running)
    app.add_middleware(BodyLimit, most=limits.body_bytes)
    app.add_middleware(Gate, lifecycle=lifecycle)
    app.add_middleware(RequestRecords)  # outside all others
    app.state.engine, app.state.lifecycle = api.running, lifecycle
    app.add_exception_handler(VeneerError, on_veneer_error)
    app.add_exception_handler(RequestValidationError, on_invalid_body)
    app.add_exception_handler(HTTPException, on_unknown_route)
    app.add_exception_handler(Exception, on_defect)
    app.post("/v1/completions")(api.complete)
    app.post("/v1/chat/completions")(api.converse)
    app.get("/v1/models")(api.models)
    add_lifecycle(app, lifecycle, api.running)
    add_metrics(app, engine, catalogue.base, metrics_prefix)
    add_page(app)
    return app


class Api:
    """Endpoints, each a method whose docstring is its description in the application's own documentation."""

    def __init__(self, engine: Engine, catalogue: Catalogue, limits: ServerLimits) -> None:
        self.engine, self.catalogue, self.limits, self.running = engine, catalogue, limits, RecordedEngine(engine)
        self._n_in_flight = 0  # choices of requests from their admission until their answers end

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Run the engine as long as the application runs."""
        self.running.start()
        yield
        await asyncio.to_thread(self.running.stop)

    async def complete(self, request: Request, body: CompletionBody) -> Response:
        """Return completions of prompts."""
        return await self._answer(request, body, lambda calls: completions.shape(body.echo))

    async def converse(self, request: Request, body: ChatBody) -> Response:
        """Return the next turn of a conversation."""
        if body.chat_template is not None and not self.limits.trust_request_templates:
            raise RefusedError(
                "chat_template is refused: it is a program, and this server runs none of its clients'. Leave it out, "
                "or start the server with --trust-request-templates",
                "chat_template",
            )
        return await self._answer(request, body, chat.shape)

    async def models(self) -> dict[str, Any]:
        """Return the base and the adapters."""
        return await asyncio.to_thread(self.catalogue.cards)

    async def _answer(
        self, request: Request, body: CompletionBody | ChatBody, shape: Callable[[Calls | None], Shape]
    ) -> Response:
        with ExitStack() as taken:  # left when the answer has ended, or when there is none
            taken.enter_context(self._admitted(body.n_choices))
            # On another thread: a template, a tokenizer, a grammar and files take their time, and everybody waits here.
            asked, calls = await asyncio.to_thread(self._ask, body)
            answering = Answering(asked, body.model or self.catalogue.base, shape(calls))
            if body.stream:
                return stream_of(self.running, answering, body.stream_options or StreamOptions(), taken.pop_all())
            return await whole_answer(self.running, request, answering)

    @contextmanager
    def _admitted(self, n: int) -> Iterator[None]:
        """A block in which ``n`` choices count as in flight. Raises RefusedError if they are too many."""
        most, taken = self.limits, self._n_in_flight
        if n > most.choices:
            raise RefusedError(
                f"{n} choices (prompts × n) are asked for, and this server takes {most.choices} in a request: ask for "
                "fewer at once, or raise its --max-choices",
                "n",
            )
        if taken + n > most.in_flight:
            seconds = self.engine.backlog.refuse(taken + n - most.in_flight)
            raise TooManyRequestsError(
                f"{taken} choices wait or are being answered, and this server takes {most.in_flight} "
                f"(--max-in-flight): ask again in {seconds:.0f} s",
                retry_seconds=seconds,
            )
        self._n_in_flight += n
        try:
            yield
        finally:
            self._n_in_flight -= n

    def _ask(self, body: CompletionBody | ChatBody) -> tuple[list[Asked], Calls | None]:
        params = body.to_params(self.engine.settings.generation_defaults)
        adapter = self._adapter(body)
        reader = self.engine.readers.of(adapter)
        calls = body.calls(reader)
        if calls is not None:
            params = calls.constrained(params)
        asked = [
            self.engine.asked(text, ids, params, adapter, cache_salt=body.cache_salt)
            for text, ids in body.read(reader, calls)
        ]
        self.engine.backlog.require_room(asked)  # while there is a status to say it with
        return asked, calls

    def _adapter(self, body: Body) -> LoRARequest | None:
        named = self.catalogue.find(body.model)
        current_record().model = body.model or self.catalogue.base
        if body.adapter is None:
            return named
        if named is not None:
            raise ConfigError(
                f"model={body.model!r} is an adapter, and the field adapter is a mix: name it there too, with a weight"
            )
        return self.catalogue.mix(body.adapter)
