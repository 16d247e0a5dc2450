"""Choices of ``/v1/completions`` in the response format."""

from __future__ import annotations

from typing import Any

from veneer.serve.asked import Asked
from veneer.serve.http.answers import Shape
from veneer.serve.outputs import CompletionOutput


def shape(echo: bool) -> Shape:
    """Return the shape of text completions; ``echo`` puts the prompt in front."""

    def choice(answer: CompletionOutput, index: int, asked: Asked) -> dict[str, Any]:
        front = (asked.prompt or "") if echo else ""
        return _choice(answer, index, front + answer.text)

    def delta(answer: CompletionOutput, index: int, asked: Asked) -> dict[str, Any]:
        return _choice(answer, index, answer.text)

    def opening(index: int, asked: Asked) -> dict[str, Any] | None:
        return {"index": index, "text": asked.prompt, "logprobs": None, "finish_reason": None} if echo else None

    return Shape(
        id="cmpl", whole="text_completion", chunk="text_completion", choice=choice, delta=delta, opening=opening
    )


def _choice(answer: CompletionOutput, index: int, text: str) -> dict[str, Any]:
    return {
        "index": index, "text": text, "logprobs": _logprobs(answer), "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
    }  # fmt: skip


def _logprobs(answer: CompletionOutput) -> dict[str, Any] | None:
    if answer.logprobs is None:
        return None
    found: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    offset = 0
    for token, each in zip(answer.token_ids, answer.logprobs, strict=True):
        text = each[token].decoded_token or ""
        found["text_offset"].append(offset)
        found["token_logprobs"].append(each[token].logprob)
        found["tokens"].append(text)
        found["top_logprobs"].append({p.decoded_token: p.logprob for p in each.values()})
        offset += len(text)
    return found
