"""Application with its routes, and an engine with the same lifetime."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from veneer.errors import VeneerError
from veneer.serve.engine import Engine
from veneer.serve.http import chat, completions
from veneer.serve.http.access import Access
from veneer.serve.http.adapters import AdapterRoutes
from veneer.serve.http.answer_models import ChatCompletions, Completions, ModelCard, ModelList
from veneer.serve.http.answers import AnswerCall, Shape, stream_of, whole_answer
from veneer.serve.http.body_route import BodyRoute
from veneer.serve.http.documented import add_description, documented
from veneer.serve.http.embeddings import Embeddings
from veneer.serve.http.errors import on_defect, on_invalid_body, on_unknown_route, on_veneer_error
from veneer.serve.http.key_file import Keys
from veneer.serve.http.lifecycle import Gate, Lifecycle, add_lifecycle
from veneer.serve.http.limits import BodyLimit
from veneer.serve.http.messages import Messages
from veneer.serve.http.metrics import add_metrics
from veneer.serve.http.models import Catalogue
from veneer.serve.http.page import add_page
from veneer.serve.http.protocol import ChatBody, CompletionBody, StreamOptions
from veneer.serve.http.request_record import RequestRecords, current_record
from veneer.serve.http.responses import Responses
from veneer.serve.http.roots import Roots
from veneer.serve.http.server_limits import ServerLimits
from veneer.serve.http.service import Service
from veneer.serve.http.tokens import Tokens
from veneer.serve.requests.calls import Calls


def make_app(
    engine: Engine,
    catalogue: Catalogue,
    limits: ServerLimits | None = None,
    *,
    keys: Keys | None = None,
    is_open: bool = False,
    roots: Roots | None = None,
    metrics_prefix: str = "veneer",
) -> FastAPI:
    """Return the application with all routes over an engine, which steps on its own thread.

    With ``keys``, each client needs a key. Without ``keys``, only clients on this machine are served, or all clients if
    ``is_open``. Adapters are loaded over HTTP from ``roots`` alone.
    """
    limits = limits or ServerLimits()
    api = Api(engine, catalogue, limits, keys)
    app = FastAPI(title="veneer", lifespan=api.lifespan, openapi_url=None)  # its pages run others' scripts
    app.router.route_class = BodyRoute
    lifecycle = Lifecycle(api.running, api.lanes)
    app.add_middleware(BodyLimit, most=limits.body_bytes)
    app.add_middleware(Gate, lifecycle=lifecycle)
    app.add_middleware(Access, keys=keys, is_open=is_open)
    app.add_middleware(RequestRecords)  # outside all others
    app.state.engine, app.state.lifecycle = api.running, lifecycle
    app.state.lanes, app.state.sandboxes = api.lanes, api.sandboxes
    app.add_exception_handler(VeneerError, on_veneer_error)
    app.add_exception_handler(RequestValidationError, on_invalid_body)
    app.add_exception_handler(HTTPException, on_unknown_route)
    app.add_exception_handler(Exception, on_defect)
    app.post("/v1/completions", **documented(Completions, streams=True))(api.complete)
    app.post("/v1/chat/completions", **documented(ChatCompletions, streams=True))(api.converse)
    app.get("/v1/models", **documented(ModelList, body=False))(api.models)
    app.get("/v1/models/", include_in_schema=False)(api.models)
    app.get("/v1/models/{id:path}", **documented(ModelCard, body=False))(api.model)
    Responses(api).add_to(app)
    Messages(api).add_to(app)
    Embeddings(api).add_to(app)
    Tokens(api).add_to(app)
    AdapterRoutes(api.running, catalogue, roots or Roots()).add_to(app)
    add_lifecycle(app, lifecycle, api.running)
    add_metrics(app, engine, catalogue.base, metrics_prefix, api.lanes)
    add_page(app)
    add_description(app)
    return app


class Api(Service):
    """Handlers of routes. The docstring of each method is the route's description in the application's API
    documentation.
    """

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Run the engine as long as the application runs."""
        await asyncio.to_thread(self.running.engine.prepare_forms)
        self.running.engine.confine(*self.sandboxes)
        self.running.start()
        watched: list[Catalogue | Keys] = [self.catalogue, *([] if self.keys is None else [self.keys])]
        for each in watched:
            each.start()
        yield
        for each in watched:
            await asyncio.to_thread(each.stop)
        await asyncio.to_thread(self.running.stop)
        for sandbox in self.sandboxes:
            sandbox.close()

    async def complete(self, request: Request, body: CompletionBody) -> Response:
        """Return completions of prompts."""
        return await self._answer(request, body, lambda calls: completions.shape(body))

    async def converse(self, request: Request, body: ChatBody) -> Response:
        """Return the next turn of a conversation."""
        self.require_trusted(body.chat_template)
        return await self._answer(request, body, chat.shape)

    async def models(self) -> Response:
        """Return the base and the adapters."""
        return Response(await asyncio.to_thread(self.catalogue.cards), media_type="application/json")

    async def model(self, id: str) -> dict[str, Any]:
        """Return the base or an adapter, by its name."""
        return await asyncio.to_thread(self.catalogue.card, id)

    async def _answer(
        self, request: Request, body: CompletionBody | ChatBody, shape: Callable[[Calls | None], Shape]
    ) -> Response:
        current_record().ignored = body.ignored
        with ExitStack() as taken:  # left when the answer has ended, or when there is none
            taken.enter_context(self.admitted(body.n_choices))
            # On another thread: a template, a tokenizer, a grammar and files take their time, and everybody waits here.
            asked, calls = await self.read(body, lambda: self.ask(body))
            taken.enter_context(self.tokens(asked))
            answering = AnswerCall(asked, body.model or self.catalogue.base, shape(calls))
            if body.stream:
                options = body.stream_options or StreamOptions()
                return stream_of(self.running, answering, options, taken.pop_all(), self.lanes.bodies)
            return await whole_answer(self.running, request, answering)
