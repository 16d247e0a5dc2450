"""Errors as a client gets them: each as OpenAI's JSON, with the status that says whose it is."""

from __future__ import annotations

import difflib
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from veneer.errors import ConfigError, ServingError, VeneerError

_TYPES = {400: "BadRequestError", 404: "NotFoundError", 500: "InternalServerError"}


class ModelNotFoundError(ConfigError):
    """A request names a model that is neither the base nor an adapter."""


def error_body(error: VeneerError, param: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    status = status_of(error)
    param = "model" if isinstance(error, ModelNotFoundError) else param
    return {"error": {"message": str(error), "type": _TYPES[status], "param": param, "code": status}}


def status_of(error: VeneerError) -> int:
    """The status of an error: 404 for a model that is not there, 500 for the server's own, else 400."""
    if isinstance(error, ModelNotFoundError):
        return 404
    return 500 if isinstance(error, ServingError) else 400


async def on_veneer_error(request: Request, error: Exception) -> JSONResponse:
    """The answer to a request that cannot be served."""
    found = error if isinstance(error, VeneerError) else ServingError(repr(error))
    return JSONResponse(error_body(found), status_of(found))


async def on_invalid_body(request: Request, error: Exception) -> JSONResponse:
    """The answer to a body that is not as the route wants it: everything that is wrong, and the first field."""
    problems = error.errors() if isinstance(error, RequestValidationError) else []
    said = "; ".join(_said(problem) for problem in problems)
    first = next((".".join(map(str, problem["loc"][1:])) or None for problem in problems), None)
    return JSONResponse(error_body(ConfigError(said), first), 400)


def _said(problem: dict[str, Any]) -> str:
    place = ".".join(str(part) for part in problem["loc"][1:])
    if problem["type"] == "extra_forbidden":
        known = list(problem.get("ctx", {}).get("known", ()))
        close = difflib.get_close_matches(place, known, n=1)
        return f"unknown field {place!r}" + (f"; did you mean {close[0]!r}?" if close else "")
    return f"{place or 'the body'}: {problem['msg']}"
