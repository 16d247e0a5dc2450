"""The application: routes, and an engine that runs while it does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from veneer.errors import ConfigError, VeneerError
from veneer.serve.asked import Asked
from veneer.serve.async_engine import AsyncEngine
from veneer.serve.conversation import chat_prompt
from veneer.serve.engine import Engine
from veneer.serve.http import chat, completions
from veneer.serve.http.answers import Answering, Shape, stream_of, whole_answer
from veneer.serve.http.errors import on_invalid_body, on_unknown_route, on_veneer_error
from veneer.serve.http.models import Catalogue
from veneer.serve.http.protocol import Body, ChatBody, CompletionBody, StreamOptions
from veneer.serve.lora_request import LoRARequest
from veneer.serve.prompts import read_prompt


def make_app(engine: Engine, catalogue: Catalogue) -> FastAPI:
    """OpenAI's completions, chat completions and models over an engine, which it steps on a thread of its own."""
    api = Api(engine, catalogue)
    app = FastAPI(title="veneer", lifespan=api.lifespan)
    app.state.engine = api.running
    app.add_exception_handler(VeneerError, on_veneer_error)
    app.add_exception_handler(RequestValidationError, on_invalid_body)
    app.add_exception_handler(HTTPException, on_unknown_route)
    app.post("/v1/completions")(api.complete)
    app.post("/v1/chat/completions")(api.converse)
    app.get("/v1/models")(api.models)
    app.get("/health")(api.health)
    return app


class Api:
    """The endpoints, each a method whose docstring is its description in the application's own documentation."""

    def __init__(self, engine: Engine, catalogue: Catalogue) -> None:
        self.engine, self.catalogue, self.running = engine, catalogue, AsyncEngine(engine)

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """The engine steps while the application runs."""
        self.running.start()
        yield
        await asyncio.to_thread(self.running.stop)

    async def complete(self, request: Request, body: CompletionBody) -> Response:
        """Text behind prompts."""
        params = body.to_params(self.engine.settings.generation_defaults)
        return await self._answer(request, body, body.prompts(), params, completions.shape(body.echo))

    async def converse(self, request: Request, body: ChatBody) -> Response:
        """The next turn of a conversation."""
        params = body.to_params(self.engine.settings.generation_defaults)
        prompt = chat_prompt(self.engine.tokenizer, body.messages, body.template())
        return await self._answer(request, body, [prompt], params, chat.SHAPE)

    async def models(self) -> dict[str, Any]:
        """The base and the adapters."""
        return await asyncio.to_thread(self.catalogue.cards)

    async def health(self) -> Response:
        """200 while the engine runs, 500 once it has broken down."""
        return Response(status_code=200 if self.running.failure is None else 500)

    async def _answer(
        self, request: Request, body: Body, prompts: Sequence[Any], params: Any, shape: Shape
    ) -> Response:
        asked = await asyncio.to_thread(self._ask, body, prompts, params)
        answering = Answering(asked, body.model or self.catalogue.base, shape)
        if body.stream:
            return stream_of(self.running, answering, body.stream_options or StreamOptions())
        return await whole_answer(self.running, request, answering)

    def _ask(self, body: Body, prompts: Sequence[Any], params: Any) -> list[Asked]:
        adapter = self._adapter(body)
        read = [read_prompt(self.engine.tokenizer, prompt) for prompt in prompts]
        return [self.engine.asked(text, ids, params, adapter) for text, ids in read]

    def _adapter(self, body: Body) -> LoRARequest | None:
        named = self.catalogue.find(body.model)
        if body.adapter is None:
            return named
        if named is not None:
            raise ConfigError(
                f"model={body.model!r} is an adapter, and the field adapter is a mix: name it there too, with a weight"
            )
        return self.catalogue.mix(body.adapter)
