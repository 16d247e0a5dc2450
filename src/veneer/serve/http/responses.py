"""Route ``/v1/responses``: a chat completion in the format of responses; nothing is stored."""

from __future__ import annotations

from functools import partial

from fastapi import FastAPI, Request
from fastapi.responses import Response

from veneer.serve.http.answer_models import ResponseAnswer
from veneer.serve.http.documented import documented
from veneer.serve.http.request_record import current_record
from veneer.serve.http.response_body import ResponsesBody
from veneer.serve.http.response_writer import ResponseWriter
from veneer.serve.http.service import Service
from veneer.serve.http.writing import written


class Responses:
    """Route of responses, whole and as streams of events."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def add_to(self, app: FastAPI) -> None:
        """Add the route to an application."""
        app.post("/v1/responses", **documented(ResponseAnswer, streams=True))(self.respond)

    async def respond(self, request: Request, body: ResponsesBody) -> Response:
        """Return the model's response to an input."""
        current_record().ignored = body.ignored
        writer = partial(ResponseWriter, body, body.model or self._service.catalogue.base)
        return await written(self._service, request, body, writer)
