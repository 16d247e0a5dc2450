"""Answers in the format of an API, whole or as a stream of events."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import ExitStack, aclosing
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import Response

from veneer.errors import VeneerError
from veneer.serve.http.answers import EventStream, unless_left
from veneer.serve.http.protocol import ChatBody
from veneer.serve.http.service import Service
from veneer.serve.requests.calls import Calls
from veneer.serve.requests.checked import CheckedRequest
from veneer.serve.schedule.outputs import CompletionOutput, RequestOutput
from veneer.serve.tool_calls.parser import Event as Part
from veneer.serve.tool_calls.parser import Parser, Text

Event = dict[str, Any]


class Writer(Protocol):
    """One answer while it is written. Each method adds a part and yields its events, each with a ``type``."""

    def begin(self) -> Iterator[Event]:
        """Yield the first events."""

    def take(self, output: RequestOutput) -> Iterator[Event]:
        """Add an output of the engine, which is the next part of the answer or all of it. Yield its events."""

    def fail(self, error: VeneerError) -> Iterator[Event]:
        """End the answer with an error. Yield the last events."""

    def whole(self) -> dict[str, Any]:
        """Return the answer as it is now."""


class AnswerPiece(Protocol):
    """Body of another API that can be read as a chat completion."""

    stream: bool

    def chat(self) -> ChatBody:
        """Return the body as one of ``/v1/chat/completions``."""


async def written(
    service: Service,
    request: Request,
    body: AnswerPiece,
    writer: Callable[[CheckedRequest, Calls | None], Writer],
) -> Response:
    """Return the answer to a chat completion in the format of ``writer``. If the client disconnects, the request ends.

    Raises VeneerError for any error that can be found before the request runs.
    """
    with ExitStack() as taken:  # left when the answer has ended, or when there is none
        taken.enter_context(service.admitted(1))
        [asked], calls = await service.read(body, lambda: service.ask(body.chat()))
        taken.enter_context(service.tokens([asked]))
        made = writer(asked, calls)
        if body.stream:
            return EventStream(_encoded(service, asked, made), taken.pop_all())
        return await unless_left(request, _whole(service, asked, made))


def parts_of(answer: CompletionOutput, parser: Parser | None) -> list[Part]:
    """Return the text of an answer as parts. If there is a parser, tool calls in the text are separate parts."""
    if parser is None:
        return [Text(answer.text)] if answer.text else []
    return parser.feed(answer.text) + (parser.finish() if answer.finished() else [])


async def _whole(service: Service, asked: CheckedRequest, writer: Writer) -> str:
    async with aclosing(_outputs(service, asked)) as outputs:
        async for output in outputs:
            for _ in writer.take(output):
                pass
    return json.dumps(writer.whole(), ensure_ascii=False)


async def _encoded(service: Service, asked: CheckedRequest, writer: Writer) -> AsyncGenerator[bytes, None]:
    try:
        yield _sent(writer.begin())
        async with aclosing(_outputs(service, asked)) as outputs:
            async for output in outputs:
                told = _sent(writer.take(output))
                if told:
                    yield told
    except VeneerError as error:
        yield _sent(writer.fail(error))


async def _outputs(service: Service, asked: CheckedRequest) -> AsyncGenerator[RequestOutput, None]:
    """Yield the outputs of a request. Raises its error if it fails."""
    async with aclosing(service.running.outputs([asked])) as outputs:
        async for output in outputs:
            if output.error is not None:
                raise output.error
            yield output


def _sent(events: Iterator[Event]) -> bytes:
    """Encode events as server-sent events, each with its type. A lone surrogate is escaped, as in JSON."""
    return "".join(
        f"event: {event['type']}\ndata: {json.dumps(event, ensure_ascii=False)}\n\n" for event in events
    ).encode(errors="backslashreplace")  # a client's lone surrogates: this is how JSON writes them
