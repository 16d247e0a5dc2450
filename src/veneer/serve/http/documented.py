"""Description of the routes: their statuses, and ``/openapi.json``."""

from __future__ import annotations

import json
from functools import cache
from typing import Any, Literal

from fastapi import FastAPI, Response
from pydantic import BaseModel

_ERRORS = {
    400: "A request that its client can mend.",
    401: "A missing or unknown key.",
    403: "A key that may not do this.",
    404: "An unknown model.",
    413: "A body that is too large.",
    429: "Too much at once: ask again after the seconds of Retry-After.",
    500: "An error of the server.",
    503: "A server that is not ready, or is being stopped.",
}


class ErrorDetail(BaseModel):
    """Error in OpenAI's fields. ``param`` is the field at fault, and ``code`` the HTTP status."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorBody(BaseModel):
    """Body of every error response."""

    error: ErrorDetail


class MessageErrorDetail(BaseModel):
    """Error in Anthropic's fields."""

    type: str
    message: str


class MessageErrorBody(BaseModel):
    """Body of every error response of Anthropic's routes."""

    type: Literal["error"]
    error: MessageErrorDetail
    request_id: str


def documented(
    answer: type[BaseModel] | None = None,
    *,
    streams: bool = False,
    text: bool = False,
    body: bool = True,
    error: type[BaseModel] = ErrorBody,
) -> dict[str, Any]:
    """Return a route's options for the API description.

    ``answer``: model of the response. ``streams``: the response may also be a stream of events. ``text``: the response
    is plain text. ``body``: the request has a body, so that errors about bodies are listed. ``error``: model of the
    errors.
    """
    found: dict[int | str, dict[str, Any]] = {
        status: {"model": error, "description": told}
        for status, told in _ERRORS.items()
        if body or status not in (400, 413, 429)
    }
    # With a default, FastAPI adds no 422, which is never sent.
    found["default"] = {"model": error, "description": "Any other error."}
    if answer is not None:
        found[200] = {"model": answer, "description": "The answer."}
    if streams:
        event = {"text/event-stream": {"schema": {"type": "string"}}}
        found.setdefault(200, {"description": "The answer; with stream=true its events."})["content"] = event
    if not text:
        return {"responses": found}
    found[200] = {"description": "The answer.", "content": {"text/plain": {"schema": {"type": "string"}}}}
    # The media type of a class of responses would be told for errors too, which are JSON.
    return {"responses": found, "response_class": Response}


def empty(status: int) -> dict[str, Any]:
    """Return the options of a route whose response has no body if it succeeds. ``status`` is the only error status."""
    return {"responses": {status: {"model": ErrorBody, "description": _ERRORS[status]}}, "response_class": Response}


def add_description(app: FastAPI) -> None:
    """Add the route ``/openapi.json``. The description is generated once, on the first request."""

    @cache
    def told() -> bytes:
        return json.dumps(app.openapi()).encode()

    def description() -> Response:  # no coroutine: the first one runs on a thread beside the loop
        return Response(told(), media_type="application/json")

    app.get("/openapi.json", include_in_schema=False)(description)
