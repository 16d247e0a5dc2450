"""Choices of ``/v1/chat/completions`` in the response format."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from veneer.serve.http.answers import PromptScores, Shape
from veneer.serve.requests.calls import Calls
from veneer.serve.requests.checked import CheckedRequest
from veneer.serve.schedule.outputs import CompletionOutput, Logprob
from veneer.serve.tool_calls.parser import Arguments, Begun, Event, Parser, Text


def _choice(answer: CompletionOutput, index: int, asked: CheckedRequest, scores: PromptScores) -> dict[str, Any]:
    return {"index": index, "message": {"role": "assistant", "content": answer.text}} | _rest(answer, asked)


def _delta(answer: CompletionOutput, index: int, asked: CheckedRequest, scores: PromptScores) -> dict[str, Any]:
    return {"index": index, "delta": {"content": answer.text} if answer.text else {}} | _rest(answer, asked)


def _opening(index: int, asked: CheckedRequest) -> dict[str, Any]:
    return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}


def _rest(answer: CompletionOutput, asked: CheckedRequest) -> dict[str, Any]:
    reasons = {"finish_reason": answer.finish_reason, "stop_reason": answer.stop_reason}
    return {
        "logprobs": None if answer.logprobs is None else {"content": logprobs_of(answer, asked.params.logprobs or 0)}
    } | reasons


def logprobs_of(answer: CompletionOutput, count: int) -> list[dict[str, Any]]:
    """Return the log-probability of each token, and those of the ``count`` likeliest tokens at its position."""
    found = []
    for token, each in zip(answer.token_ids, answer.logprobs or [], strict=True):
        best = [_one(p) for p in sorted(each.values(), key=lambda p: p.rank or 0)][:count]
        found.append(_one(each[token]) | {"top_logprobs": best})
    return found


def _one(p: Logprob) -> dict[str, Any]:
    text = p.decoded_token or ""
    return {"token": text, "logprob": p.logprob, "bytes": list(text.encode())}


def shape(calls: Calls | None = None) -> Shape:
    """Return the response format of chat completions. ``calls`` is given if answers may have tool calls.

    The format keeps state: pass the deltas of each choice in their order.
    """
    shaped = partial(Shape, id="chatcmpl", whole="chat.completion", chunk="chat.completion.chunk", opening=_opening)
    if calls is None:
        return shaped(choice=_choice, delta=_delta)
    parsers: dict[int, Parser] = {}  # of choices that are streamed

    def parsed(parser: Parser, answer: CompletionOutput, asked: CheckedRequest) -> tuple[list[Event], dict[str, Any]]:
        events = parser.feed(answer.text)
        events += parser.finish() if answer.finished() else []
        rest = _rest(answer, asked)
        if answer.finish_reason == "stop" and parser.is_called:
            rest["finish_reason"] = "tool_calls"
        return events, rest

    def choice(answer: CompletionOutput, index: int, asked: CheckedRequest, scores: PromptScores) -> dict[str, Any]:
        events, rest = parsed(calls.parser(), answer, asked)
        made = [{k: v for k, v in call.items() if k != "index"} for call in _calls(events)]
        message = {"role": "assistant", "content": _text(events) or (None if made else "")}
        return {"index": index, "message": message | ({"tool_calls": made} if made else {})} | rest

    def delta(answer: CompletionOutput, index: int, asked: CheckedRequest, scores: PromptScores) -> dict[str, Any]:
        if index not in parsers:
            parsers[index] = calls.parser()
        events, rest = parsed(parsers[index], answer, asked)
        text, made = _text(events), _calls(events)
        shown = ({"content": text} if text else {}) | ({"tool_calls": made} if made else {})
        return {"index": index, "delta": shown} | rest

    return shaped(choice=choice, delta=delta)


def _text(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Text))


def _calls(events: Sequence[Event]) -> list[dict[str, Any]]:
    """Return one dict for each call that the events mention: the whole call or, in a stream, its new part."""
    found: dict[int, dict[str, Any]] = {}
    for event in events:
        if isinstance(event, Begun):
            function = {"name": event.name, "arguments": ""}
            found[event.index] = {"index": event.index, "id": event.id, "type": "function", "function": function}
        elif isinstance(event, Arguments):
            call = found.setdefault(event.index, {"index": event.index, "function": {"arguments": ""}})
            call["function"]["arguments"] += event.text
    return list(found.values())
