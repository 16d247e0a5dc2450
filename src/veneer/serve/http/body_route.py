"""Route whose large bodies are parsed beside the loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

_SMALL = 2**16  # bytes, which are parsed in a millisecond


class BodyRequest(Request):
    """Request whose body is parsed on another thread if it is large."""

    async def json(self) -> Any:
        """Return the body. Raises JSONDecodeError."""
        body = await self.body()
        return json.loads(body) if len(body) <= _SMALL else await asyncio.to_thread(parsed, body)


class BodyRoute(APIRoute):
    """Route of an application whose requests are `BodyRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler."""
        answer = super().get_route_handler()

        async def answer_body(request: Request) -> Response:
            return await answer(BodyRequest(request.scope, request.receive))

        return answer_body


def parsed(body: bytes) -> Any:
    """Return a JSON text as `json.loads` does, and let other threads run meanwhile. Raises JSONDecodeError.

    The parser is one call, which keeps the interpreter to itself until it calls a function of Python: here for each
    object and each whole number.
    """
    return json.loads(body, object_hook=_object, parse_int=_int)


def _object(given: dict[str, Any]) -> dict[str, Any]:
    return given


def _int(text: str) -> int:
    return int(text)
