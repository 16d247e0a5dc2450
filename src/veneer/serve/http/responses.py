"""Route ``/v1/responses``: a response is a chat completion in other words, and nothing of it is stored."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from veneer.errors import VeneerError
from veneer.serve.asked import Asked
from veneer.serve.http.answers import EventStream, unless_left
from veneer.serve.http.documented import documented
from veneer.serve.http.response_body import ResponsesBody
from veneer.serve.http.response_events import Written, encoded
from veneer.serve.http.service import Service


class Responses:
    """Route of responses, whole and as streams of events."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def add_to(self, app: FastAPI) -> None:
        """Add the route to an application."""
        app.post("/v1/responses", **documented(streams=True))(self.respond)

    async def respond(self, request: Request, body: ResponsesBody) -> Response:
        """Return the model's response to an input."""
        with ExitStack() as taken:  # left when the answer has ended, or when there is none
            taken.enter_context(self._service.admitted(1))
            asked = await asyncio.to_thread(self._ask, body)
            written = Written(body, asked, body.model or self._service.catalogue.base)
            if body.stream:
                return EventStream(self._events(asked, written), taken.pop_all())
            return await unless_left(request, self._whole(asked, written))

    def _ask(self, body: ResponsesBody) -> Asked:
        return self._service.ask(body.chat())[0]

    async def _whole(self, asked: Asked, written: Written) -> dict[str, Any]:
        async with aclosing(self._written(asked, written)) as events:
            async for _ in events:
                pass
        return written.response()

    async def _events(self, asked: Asked, written: Written) -> AsyncGenerator[bytes, None]:
        try:
            for event in written.begin():
                yield encoded(event)
            async with aclosing(self._written(asked, written)) as events:
                async for event in events:
                    yield encoded(event)
        except VeneerError as error:
            for event in written.fail(error):
                yield encoded(event)

    async def _written(self, asked: Asked, written: Written) -> AsyncGenerator[dict[str, Any], None]:
        """The events of an answer. Raises the error of a request that fails."""
        async with aclosing(self._service.running.outputs([asked])) as outputs:
            async for output in outputs:
                if output.error is not None:
                    raise output.error
                for event in written.take(output):
                    yield event
