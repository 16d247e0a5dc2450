"""Route whose large bodies are parsed on another thread than the event loop's."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from veneer.serve.http.errors import RefusedError, retry_header

_SMALL = 2**16  # bytes, which are parsed in a millisecond
_MOST_DIGITS = 40  # of a whole number: fields have 64 bits, schemas may have more
_LONGEST_NAME = 100  # characters of a key in a message
NOWHERE = -1
"""Position in a JSONDecodeError for a fault of the body as a whole."""


class BodyRequest(Request):
    """Request whose body is parsed on a thread of the application's lane of bodies if it is large."""

    async def json(self) -> Any:
        """Return the value of a JSON body. Raises JSONDecodeError as `parsed` does."""
        body = await self.body()
        if len(body) <= _SMALL:
            return parsed(body)
        try:
            return await self.app.state.lanes.bodies.run(lambda: parsed(body))
        except RefusedError as error:  # FastAPI knows no other error of a body
            raise HTTPException(error.status, str(error), retry_header(error)) from error


class BodyRoute(APIRoute):
    """Route of an application whose requests are `BodyRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler."""
        answer = super().get_route_handler()

        async def answer_body(request: Request) -> Response:
            return await answer(BodyRequest(request.scope, request.receive))

        return answer_body


def parsed(body: bytes) -> Any:
    """Parse JSON as `json.loads` does, and let other threads run meanwhile.

    The parser is one call, which holds the interpreter's lock until it calls a Python function: here for each object
    and each number. Raises JSONDecodeError, also for text that is not strict JSON (NaN, other encodings), and for text
    that readers interpret in different ways (a repeated key, numbers of many digits).
    """
    try:
        return json.loads(body, object_pairs_hook=_object, parse_int=_int, parse_float=_float, parse_constant=_constant)
    except RecursionError as error:
        raise _wrong("its lists and objects are nested too deeply") from error
    except UnicodeDecodeError as error:
        raise _wrong("it is not UTF-8") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
        raise _wrong(f"an object has the key {twice[:_LONGEST_NAME]!r} twice")
    return made


def _int(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise _wrong(f"a number has {len(text)} digits, and at most {_MOST_DIGITS} are read")
    return int(text)


def _float(text: str) -> float:
    return float(text)


def _constant(text: str) -> Any:
    raise _wrong(f"{text} is not a JSON number")


def _wrong(reason: str) -> json.JSONDecodeError:
    return json.JSONDecodeError(reason, "", NOWHERE)
