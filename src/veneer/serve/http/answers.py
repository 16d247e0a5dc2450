"""Answers to a checked request, whole or as a stream; the request ends if its client disconnects."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractContextManager, aclosing
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from veneer.errors import VeneerError
from veneer.serve.async_engine import AsyncEngine
from veneer.serve.http.errors import error_body
from veneer.serve.http.lanes import Lane
from veneer.serve.http.protocol import StreamOptions
from veneer.serve.http.request_record import GONE
from veneer.serve.requests.checked import CheckedRequest
from veneer.serve.schedule.outputs import CompletionOutput, RequestOutput, TokenLogprobs

_UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # a proxy passes each event on as it comes
_ENCODE = json.JSONEncoder(ensure_ascii=False).encode
_LEVELS = 5  # of an answer, choices, a choice, its log-probabilities, and a list of them
PromptScores = Sequence[TokenLogprobs | None] | None
"""Log-probabilities of a prompt, if they are asked for."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Response format of a route: the prefix of ids, the objects' names, and functions that build choices.

    ``choice`` builds a choice of a complete response from an answer and its index, ``delta`` a choice of a stream.
    ``opening`` builds the first event of a stream for each choice. If ``tells_answers`` is False, the answers' texts
    are empty. If ``lists_prompt``, the first choice of a prompt also has the prompt's log-probabilities.
    """

    id: str
    whole: str
    chunk: str
    choice: Callable[[CompletionOutput, int, CheckedRequest, PromptScores], dict[str, Any]]
    delta: Callable[[CompletionOutput, int, CheckedRequest, PromptScores], dict[str, Any]]
    opening: Callable[[int, CheckedRequest], dict[str, Any] | None]
    lists_prompt: bool = True
    tells_answers: bool = True


@dataclass(frozen=True)
class AnswerCall:
    """Requests of one call, the name of their model, and the shape of the response."""

    asked: Sequence[CheckedRequest]
    model: str
    shape: Shape
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def head(self, kind: str) -> dict[str, Any]:
        """Return the fields with which every object of this call begins."""
        return {"id": f"{self.shape.id}-{self.id}", "object": kind, "created": self.created, "model": self.model}

    def index(self, output: RequestOutput, answer: CompletionOutput) -> int:
        """Return the index of an answer among the choices, which are ordered like the prompts."""
        return self._places[output.request_id] * self.asked[0].params.n + answer.index

    def answers(self, output: RequestOutput) -> list[CompletionOutput]:
        """Return the answers of an output.

        Their texts are empty if the route does not return answers, only the prompt's scores.
        """
        return output.outputs if self.shape.tells_answers else [_emptied(answer) for answer in output.outputs]

    @cached_property
    def _places(self) -> dict[str, int]:
        return {asked.id: place for place, asked in enumerate(self.asked)}

    def usage(self, n_answered: int, n_cached: int) -> dict[str, Any]:
        """Return the numbers of prompt tokens, of generated tokens, and of prompt tokens found in the prefix cache."""
        n_prompt = sum(len(asked.prompt_ids) for asked in self.asked)
        return {
            "prompt_tokens": n_prompt, "completion_tokens": n_answered, "total_tokens": n_prompt + n_answered,
            "prompt_tokens_details": {"cached_tokens": n_cached},
        }  # fmt: skip


async def whole_answer(engine: AsyncEngine, request: Request, answering: AnswerCall) -> Response:
    """Return all choices at once; if the client disconnects first, its requests end.

    Raises the error of a request that fails.
    """
    return await unless_left(request, _choices(engine, answering, request.app.state.lanes.bodies))


async def unless_left(request: Request, found: Coroutine[Any, Any, str]) -> Response:
    """Return the JSON text of ``found`` as a response. If the client disconnects first, ``found`` is cancelled."""
    finding = asyncio.ensure_future(found)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({finding, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not finding.done():
            return Response(status_code=GONE)
        # What a client sent may hold lone surrogates: in JSON a backslash escape is what they are.
        return Response(finding.result().encode(errors="backslashreplace"), media_type="application/json")
    finally:
        leaving.cancel()
        finding.cancel()
        await asyncio.gather(finding, leaving, return_exceptions=True)


def stream_of(
    engine: AsyncEngine,
    answering: AnswerCall,
    options: StreamOptions,
    taken: AbstractContextManager[object],
    lane: Lane,
) -> StreamingResponse:
    """Return the choices as server-sent events; if the client disconnects, its requests end.

    The context ``taken`` is exited when the stream has ended. The ``lane`` encodes log-probabilities of prompts.
    """
    return EventStream(_events(engine, answering, options, lane), taken)


class EventStream(StreamingResponse):
    """Stream of server-sent events.

    However the stream ends, even before its first event, its event generator is closed and the context ``taken`` is
    exited.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], taken: AbstractContextManager[object]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=_UNBUFFERED)
        self._events, self._taken = events, taken

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._taken:
            async with aclosing(self._events):
                await super().__call__(scope, receive, send)


async def _choices(engine: AsyncEngine, answering: AnswerCall, lane: Lane) -> str:
    """Return the JSON of all choices. With log-probabilities it is long, so a thread of ``lane`` encodes it, not the
    event loop.
    """
    found = list[RequestOutput]()
    async with aclosing(engine.outputs(answering.asked)) as outputs:
        async for output in outputs:
            if output.error is not None:
                raise output.error
            found.append(output)
    asked = (output.prompt_logprobs or any(answer.logprobs for answer in output.outputs) for output in found)
    return await lane.run(partial(_whole, answering, found)) if any(asked) else _whole(answering, found)


def _whole(answering: AnswerCall, outputs: Sequence[RequestOutput]) -> str:
    choices, n_answered, n_cached = {}, 0, 0
    by_id = {asked.id: asked for asked in answering.asked}
    for output in outputs:
        scores = output.prompt_logprobs
        for answer in answering.answers(output):
            index = answering.index(output, answer)
            choices[index] = answering.shape.choice(answer, index, by_id[output.request_id], scores)
            n_answered += len(answer.token_ids)
        n_cached += output.num_cached_tokens
        if scores is not None and answering.shape.lists_prompt:
            choices[answering.index(output, output.outputs[0])]["prompt_logprobs"] = _plain(scores)
    found = [choices[index] for index in sorted(choices)]
    whole = {"choices": found, "usage": answering.usage(n_answered, n_cached)}
    return "".join(_json(answering.head(answering.shape.whole) | whole))


def _json(value: Any, levels: int = _LEVELS) -> Iterator[str]:
    """Yield JSON in pieces: encoding it whole would be one call that holds the interpreter's lock."""
    if levels and isinstance(value, list):
        yield "["
        for place, each in enumerate(value):
            yield ", " if place else ""
            yield from _json(each, levels - 1)
        yield "]"
    elif levels > 1 and isinstance(value, dict):
        yield "{"
        for place, (name, each) in enumerate(value.items()):
            yield f"{', ' if place else ''}{_ENCODE(name)}: "
            yield from _json(each, levels - 1)
        yield "}"
    else:
        yield _ENCODE(value)


async def _events(
    engine: AsyncEngine, answering: AnswerCall, options: StreamOptions, lane: Lane
) -> AsyncGenerator[bytes, None]:
    """Yield the events of a stream. Events that arrive together are one write."""
    head, shape = answering.head(answering.shape.chunk), answering.shape
    front = f"data: {_ENCODE(head)[:-1]}, "  # which all events have in common
    by_id, n_answered, n_cached = {asked.id: asked for asked in answering.asked}, 0, dict[str, int]()

    def event(choices: list[dict[str, Any]], usage: bool = False, levels: int = 0) -> str:
        told = f', "usage": {_ENCODE(answering.usage(n_answered, sum(n_cached.values())))}' if usage else ""
        return f'{front}"choices": {"".join(_json(choices, levels))}{told}}}\n\n'

    def events_of(output: RequestOutput) -> list[str]:
        asked, found = by_id[output.request_id], list[str]()
        for answer in answering.answers(output):
            choice = shape.delta(answer, answering.index(output, answer), asked, output.prompt_logprobs)
            levels = 0 if output.prompt_logprobs is None else _LEVELS - 1
            found.append(event([choice], options.continuous_usage_stats, levels))
        return found

    openings = [
        shape.opening(index, asked)
        for place, asked in enumerate(answering.asked)
        for index in range(place * asked.params.n, (place + 1) * asked.params.n)
    ]
    if any(openings):
        yield "".join(event([opening]) for opening in openings if opening is not None).encode()
    try:
        async with aclosing(engine.batches(answering.asked)) as batches:
            async for batch in batches:
                events, failed = list[str](), None
                for output in batch:
                    failed = output.error
                    if failed is not None:
                        break
                    n_answered += sum(len(answer.token_ids) for answer in answering.answers(output))
                    n_cached[output.request_id] = output.num_cached_tokens
                    told = partial(events_of, output)
                    events += told() if output.prompt_logprobs is None else await lane.run(told)
                yield "".join(events).encode()
                if failed is not None:
                    raise failed
        if options.include_usage:
            yield event([], usage=True).encode()
    except VeneerError as error:
        yield f"data: {json.dumps(error_body(error))}\n\n".encode()
    yield b"data: [DONE]\n\n"


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _emptied(answer: CompletionOutput) -> CompletionOutput:
    """Return an answer of one token with its token and text removed."""
    logprobs: list[TokenLogprobs] | None = None if answer.logprobs is None else []
    return replace(answer, text="", token_ids=[], logprobs=logprobs, finish_reason="length", stop_reason=None)


def _plain(scores: Sequence[Any]) -> list[Any]:
    """Return a prompt's log-probabilities as JSON values: for each token a dict with ids as text keys, or None."""
    return [
        each
        and {
            str(id): {"logprob": p.logprob, "rank": p.rank, "decoded_token": p.decoded_token} for id, p in each.items()
        }
        for each in scores
    ]
