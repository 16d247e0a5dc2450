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

from veneer.errors import VeneerError
from veneer.serve.async_engine import AsyncEngine
from veneer.serve.conversation import chat_prompt
from veneer.serve.engine import Asked, Engine
from veneer.serve.http import chat, completions
from veneer.serve.http.answers import Answering, Shape, stream_of, whole_answer
from veneer.serve.http.errors import on_invalid_body, on_unknown_route, on_veneer_error
from veneer.serve.http.models import Catalogue
from veneer.serve.http.protocol import Body, ChatBody, CompletionBody, StreamOptions
from veneer.serve.prompts import read_prompt


def make_app(engine: Engine, catalogue: Catalogue) -> FastAPI:
    """OpenAI's completions, chat completions and models over an engine, which it steps on a thread of its own."""
    running = AsyncEngine(engine)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        running.start()
        yield
        await asyncio.to_thread(running.stop)

    app = FastAPI(title="veneer", lifespan=lifespan)
    app.add_exception_handler(VeneerError, on_veneer_error)
    app.add_exception_handler(RequestValidationError, on_invalid_body)
    app.add_exception_handler(HTTPException, on_unknown_route)

    async def answer(request: Request, body: Body, prompts: Sequence[Any], params: Any, shape: Shape) -> Response:
        def ask() -> list[Asked]:
            adapter = catalogue.find(body.model)
            read = [read_prompt(engine.tokenizer, prompt) for prompt in prompts]
            return [engine.asked(text, ids, params, adapter) for text, ids in read]

        answering = Answering(await asyncio.to_thread(ask), body.model or catalogue.base, shape)
        if body.stream:
            return stream_of(running, answering, body.stream_options or StreamOptions())
        return await whole_answer(running, request, answering)

    @app.post("/v1/completions")
    async def complete(request: Request, body: CompletionBody) -> Response:
        """Text behind prompts."""
        params = body.to_params(engine.settings.generation_defaults)
        return await answer(request, body, body.prompts(), params, completions.shape(body.echo))

    @app.post("/v1/chat/completions")
    async def converse(request: Request, body: ChatBody) -> Response:
        """The next turn of a conversation."""
        params = body.to_params(engine.settings.generation_defaults)
        prompt = chat_prompt(engine.tokenizer, body.messages, body.template())
        return await answer(request, body, [prompt], params, chat.SHAPE)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The base and the adapters."""
        return await asyncio.to_thread(catalogue.cards)

    @app.get("/health")
    async def health() -> Response:
        """200 while the engine runs, 500 once it has broken down."""
        return Response(status_code=200 if running.failure is None else 500)

    return app
