"""Choices of ``/v1/completions`` in the response format."""

from __future__ import annotations

from typing import Any

from veneer.serve.asked import Asked
from veneer.serve.http.answers import Shape
from veneer.serve.outputs import CompletionOutput


def shape(echo: bool) -> Shape:
    """Return the shape of the text completions of one call; ``echo`` puts the prompt in front."""
    offsets = dict[int, int]()  # of the text that a stream has told, by choice

    def choice(answer: CompletionOutput, index: int, asked: Asked) -> dict[str, Any]:
        front = (asked.prompt or "") if echo else ""
        return _choice(answer, index, front + answer.text, 0)[0]

    def delta(answer: CompletionOutput, index: int, asked: Asked) -> dict[str, Any]:
        made, offsets[index] = _choice(answer, index, answer.text, offsets.get(index, 0))
        return made

    def opening(index: int, asked: Asked) -> dict[str, Any] | None:
        return {"index": index, "text": asked.prompt, "logprobs": None, "finish_reason": None} if echo else None

    return Shape(
        id="cmpl", whole="text_completion", chunk="text_completion", choice=choice, delta=delta, opening=opening
    )


def _choice(answer: CompletionOutput, index: int, text: str, offset: int) -> tuple[dict[str, Any], int]:
    """The choice, and the offset of what follows it."""
    logprobs, offset = _logprobs(answer, offset)
    return {
        "index": index, "text": text, "logprobs": logprobs, "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
    }, offset  # fmt: skip


def _logprobs(answer: CompletionOutput, offset: int) -> tuple[dict[str, Any] | None, int]:
    if answer.logprobs is None:
        return None, offset
    found: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    for token, each in zip(answer.token_ids, answer.logprobs, strict=True):
        text = each[token].decoded_token or ""
        found["text_offset"].append(offset)
        found["token_logprobs"].append(each[token].logprob)
        found["tokens"].append(text)
        found["top_logprobs"].append({p.decoded_token: p.logprob for p in each.values()})
        offset += len(text)
    return found, offset
