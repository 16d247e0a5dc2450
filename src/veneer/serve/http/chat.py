"""Choices of ``/v1/chat/completions`` in the response format."""

from __future__ import annotations

from typing import Any

from veneer.serve.asked import Asked
from veneer.serve.http.answers import Shape
from veneer.serve.outputs import CompletionOutput, Logprob


def _choice(answer: CompletionOutput, index: int, asked: Asked) -> dict[str, Any]:
    return {"index": index, "message": {"role": "assistant", "content": answer.text}} | _rest(answer, asked)


def _delta(answer: CompletionOutput, index: int, asked: Asked) -> dict[str, Any]:
    return {"index": index, "delta": {"content": answer.text} if answer.text else {}} | _rest(answer, asked)


def _opening(index: int, asked: Asked) -> dict[str, Any]:
    return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}


def _rest(answer: CompletionOutput, asked: Asked) -> dict[str, Any]:
    reasons = {"finish_reason": answer.finish_reason, "stop_reason": answer.stop_reason}
    return {
        "logprobs": None if answer.logprobs is None else {"content": _logprobs(answer, asked.params.logprobs or 0)}
    } | reasons


def _logprobs(answer: CompletionOutput, count: int) -> list[dict[str, Any]]:
    found = []
    for token, each in zip(answer.token_ids, answer.logprobs or [], strict=True):
        best = [_one(p) for p in sorted(each.values(), key=lambda p: p.rank or 0)][:count]
        found.append(_one(each[token]) | {"top_logprobs": best})
    return found


def _one(p: Logprob) -> dict[str, Any]:
    text = p.decoded_token or ""
    return {"token": text, "logprob": p.logprob, "bytes": list(text.encode())}


SHAPE = Shape(
    id="chatcmpl",
    whole="chat.completion",
    chunk="chat.completion.chunk",
    choice=_choice,
    delta=_delta,
    opening=_opening,
)
