"""Errors as OpenAI's JSON or Anthropic's, each with the status that says whether client or server is at fault."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.routing import Match

from veneer.errors import ConfigError, QueueFullError, ServingError, VeneerError
from veneer.plain.refusals import allowed, place_in
from veneer.serve.http.request_record import HEADER, current_record

_TYPES = {
    400: "BadRequestError", 401: "AuthenticationError", 403: "PermissionDeniedError", 404: "NotFoundError",
    405: "MethodNotAllowedError", 408: "RequestTimeoutError", 409: "ConflictError", 413: "ContentTooLargeError",
    429: "RateLimitError", 431: "HeadersTooLargeError", 500: "InternalServerError", 503: "ServiceUnavailableError",
}  # fmt: skip
_ANTHROPICS = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 500: "api_error", 503: "overloaded_error",
}  # fmt: skip
_MEANT = (  # fields that other routes and servers have under another name
    ("messages", "input", "prompt"), ("max_completion_tokens", "max_output_tokens", "max_tokens", "max_new_tokens"),
    ("tools", "functions"), ("tool_choice", "function_call"), ("stop", "stop_sequences"),
    ("text", "response_format", "output_config"), ("system", "instructions"), ("input_schema", "parameters"),
)  # fmt: skip
_NO_JSON = "json_invalid"
_TOLD = 10  # problems of one body in a message
_SHOWN = 60  # characters of a value that is told
_WHOLE = (_NO_JSON, "missing", "extra_forbidden")  # about an object as a whole
_LONGEST_NAME = 100  # characters of a field's name in a message


class RefusedError(ConfigError):
    """Refusal of a request, with an HTTP status; ``param`` is the field at fault."""

    status: ClassVar[int] = 400

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ModelNotFoundError(RefusedError):
    """Request that names an unknown model."""

    status = 404

    def __init__(self, message: str, param: str = "model") -> None:
        super().__init__(message, param)


class UnauthorizedError(RefusedError):
    """Request without a key, or with an unknown one."""

    status = 401


class ForbiddenError(RefusedError):
    """Request that its key does not permit."""

    status = 403


class ConflictError(RefusedError):
    """Request for a change while another change is in progress."""

    status = 409


class BodyTooLargeError(RefusedError):
    """Body with more bytes than the server accepts."""

    status = 413


class HeadTooLargeError(RefusedError):
    """Request whose address and headers are too large."""

    status = 431


class TooSlowError(RefusedError):
    """Request whose headers or body did not come in time."""

    status = 408


class RetryLaterError(RefusedError):
    """Refusal of a request that the client should send again after ``retry_seconds``."""

    def __init__(self, message: str, param: str | None = None, retry_seconds: float = 1) -> None:
        super().__init__(message, param)
        self.retry_seconds = retry_seconds


class TooManyRequestsError(RetryLaterError):
    """Request beyond a limit of what may be in flight."""

    status = 429


class BusyError(RetryLaterError):
    """Request for which the server has no free thread or connection now."""

    status = 503


def message_error(error: VeneerError) -> dict[str, Any]:
    """Return an error as Anthropic's clients read it."""
    return _anthropics(str(error), status_of(error))


def error_body(error: VeneerError, param: str | None = None) -> dict[str, Any]:
    """Return an error as the clients of the current route read it: OpenAI's, or Anthropic's."""
    return _body(str(error), status_of(error), error.param if isinstance(error, RefusedError) else param)


def _anthropics(message: str, status: int) -> dict[str, Any]:
    told = {"type": _ANTHROPICS.get(status, "invalid_request_error"), "message": _sendable(message)}
    return {"type": "error", "error": told, "request_id": current_record().id}


def _body(message: str, status: int, param: str | None = None) -> dict[str, Any]:
    if current_record().is_anthropics:
        return _anthropics(message, status)
    told = {"message": _sendable(message), "type": _TYPES.get(status, "Error"), "param": param and _sendable(param)}
    return {"error": told | {"code": status}}


def _sendable(text: str) -> str:
    """Return text that UTF-8 can encode: a body may contain half of a surrogate pair."""
    return text.encode(errors="backslashreplace").decode()


def status_of(error: VeneerError) -> int:
    """Return the HTTP status of an error: a refusal's own, 500 for a fault of the server, else 400."""
    if isinstance(error, RefusedError):
        return error.status
    if isinstance(error, QueueFullError):
        return TooManyRequestsError.status
    return 500 if isinstance(error, ServingError) else 400


def error_response(error: VeneerError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Return the response to a request that cannot be served; it says when to ask again if the error does."""
    return JSONResponse(error_body(error), status_of(error), {**(headers or {}), **retry_header(error)})


def retry_header(error: VeneerError) -> dict[str, str]:
    """Return the header that says when to retry; empty unless the error says it."""
    if not isinstance(error, RetryLaterError | QueueFullError):
        return {}
    return {"Retry-After": str(math.ceil(error.retry_seconds))}


async def on_veneer_error(request: Request, error: Exception) -> JSONResponse:
    """Return the response to a request that cannot be served."""
    return error_response(error if isinstance(error, VeneerError) else ServingError(repr(error)))


async def on_defect(request: Request, error: Exception) -> JSONResponse:
    """Return the response to a request that met a defect of the server; the log has the traceback."""
    told = ServingError(f"the server has a defect: {type(error).__name__}. Its log has the rest.")
    return error_response(told, {HEADER: current_record().id})


async def on_unknown_route(request: Request, error: Exception) -> JSONResponse:
    """Return the response to an unknown path, or to a method that its path does not accept.

    It names the methods of the path, or the nearest path, or all routes.
    """
    status = error.status_code if isinstance(error, HTTPException) else 500
    told = {404: _near_route, 405: _methods}.get(status)
    message = f"no route '{request.method} {request.url.path}'; {told(request)}" if told else str(error)
    return JSONResponse(_body(message, status), status, getattr(error, "headers", None))


def _methods(request: Request) -> str:
    there = [route for route in request.app.routes if route.matches(request.scope)[0] is Match.PARTIAL]
    return f"use {' or '.join(sorted({method for route in there for method in route.methods} - {'HEAD'}))}"


def _near_route(request: Request) -> str:
    known = _routes(request.app)
    close = difflib.get_close_matches(request.url.path[:_LONGEST_NAME], [path for path, _ in known], n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"there are {', '.join(f'{method} {path}' for path, method in known)}"


def _routes(app: FastAPI) -> list[tuple[str, str]]:
    found = [route for route in app.routes if isinstance(route, APIRoute)]
    return sorted({(route.path_format.rstrip("/") or "/", method) for route in found for method in route.methods or ()})


async def on_invalid_body(request: Request, error: Exception) -> JSONResponse:
    """Return the response to an invalid body: it lists all errors, and ``param`` is the first field at fault."""
    problems, body = (error.errors(), error.body) if isinstance(error, RequestValidationError) else ([], None)
    unread = any(not _place(problem) and problem["type"] != _NO_JSON for problem in problems)
    told = _by_field(problems, body)
    more = f"; and {len(told) - _TOLD:,} more" if len(told) > _TOLD else ""
    said = "; ".join(_said(place, of) for place, of in [*told.items()][:_TOLD]) + more
    said = (_said_of_header(request) if unread else "") or said
    return JSONResponse(error_body(ConfigError(said), next(iter(told), "") or None), 400)


def _by_field(problems: Sequence[dict[str, Any]], body: Any) -> dict[str, list[dict[str, Any]]]:
    """Group the problems by field.

    If a value may have one of several types, some problems may name the whole value and others a field within it. Then
    the problems of the whole value are left out, unless their type is in `_WHOLE`.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for problem in problems:
        found.setdefault(_place(problem, body), []).append(problem)
    within = {place[:dot] for place in found for dot in range(len(place)) if place[dot] == "."}
    return {place: of for place, of in found.items() if place not in within or any(p["type"] in _WHOLE for p in of)}


def _said_of_header(request: Request) -> str:
    """Return what is wrong with the header Content-Type of a body that should be JSON; empty if the header is right."""
    given = request.headers.get("content-type", "")
    kind = given.partition(";")[0].strip().lower()
    if kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json")):
        return ""
    # Other kinds are those that web pages of other sites can send without being asked first.
    remedy = "curl needs -H 'Content-Type: application/json'"
    return f"the body is JSON, which the header Content-Type has to say: {remedy}; given {given or 'none'}"


def _said(place: str, problems: Sequence[dict[str, Any]]) -> str:
    problem = problems[0]
    if problem["type"] == _NO_JSON:
        at = problem["loc"][1]
        return f"the body is not JSON: {problem['ctx']['error']}" + (f", at character {at}" if at >= 0 else "")
    if problem["type"] == "extra_forbidden":
        known = list(problem.get("ctx", {}).get("known", ()))
        close = [name for names in _MEANT if place in names for name in names if name in known]
        close = close or difflib.get_close_matches(place, known, n=1)  # cut before: it takes seconds for megabytes
        return f"unknown field {place!r}" + (f"; did you mean {close[0]!r}?" if close else "")
    shown = "" if problem["type"] in _WHOLE or "too_" in problem["type"] else _given(problem["input"])
    return f"{place or 'the body'}: {allowed(problems)}{shown}"


def _given(value: object) -> str:
    """Return the words "; given ..." for the end of a message, with the value itself. For a list or an object they name
    only that type; for a long value they are empty.
    """
    if isinstance(value, dict | list):
        return "; given an object" if isinstance(value, dict) else "; given a list"
    shown = json.dumps(value, default=str) if not isinstance(value, str) or len(value) <= _SHOWN else ""
    return f"; given {shown}" if 0 < len(shown) <= _SHOWN else ""


def _place(problem: dict[str, Any], body: Any = None) -> str:
    """Return the path of the field that a problem names, such as "messages.0.role"; empty for the body as a whole.

    If ``body`` is given, the path leaves out the names that pydantic inserts for the types of a union.
    """
    parts = () if problem["type"] == _NO_JSON else problem["loc"][1:]
    if body is not None and problem["loc"][0] == "body" and problem["type"] not in _WHOLE:
        parts = place_in(body, parts)
    return ".".join(str(part)[:_LONGEST_NAME] for part in parts)
