"""Choices of ``/v1/completions`` in the response format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from veneer.serve.http.answers import PromptScores, Shape
from veneer.serve.http.protocol import CompletionBody
from veneer.serve.requests.checked import CheckedRequest
from veneer.serve.requests.detokenizer import Detokenizer
from veneer.serve.schedule.outputs import CompletionOutput, TokenLogprobs

_Lists = dict[str, list[Any]]


def shape(body: CompletionBody) -> Shape:
    """Return the response format for a body; with ``echo`` each text begins with the prompt."""
    offsets = dict[int, int]()  # of the text that a stream has told, by choice

    def choice(answer: CompletionOutput, index: int, asked: CheckedRequest, scores: PromptScores) -> dict[str, Any]:
        front = (asked.prompt or "") if body.echo else ""
        made, _ = _choice(answer, index, front + answer.text, len(front))
        if body.scores_prompt:
            of_prompt = _of_prompt(asked, front, scores or [None])
            made["logprobs"] = {name: of_prompt[name] + each for name, each in made["logprobs"].items()}
        return made

    def delta(answer: CompletionOutput, index: int, asked: CheckedRequest, scores: PromptScores) -> dict[str, Any]:
        if body.scores_prompt:  # it comes at once
            return choice(answer, index, asked, scores)
        made, offsets[index] = _choice(answer, index, answer.text, offsets.get(index, 0))
        return made

    def opening(index: int, asked: CheckedRequest) -> dict[str, Any] | None:
        if not body.echo or body.scores_prompt:
            return None
        return {"index": index, "text": asked.prompt, "logprobs": None, "finish_reason": None}

    return Shape(
        id="cmpl", whole="text_completion", chunk="text_completion", choice=choice, delta=delta, opening=opening,
        lists_prompt=body.prompt_logprobs is not None, tells_answers=body.max_tokens != 0,
    )  # fmt: skip


def _choice(answer: CompletionOutput, index: int, text: str, offset: int) -> tuple[dict[str, Any], int]:
    """Return the choice with this text, and the offset at which the text after it begins."""
    logprobs, offset = _logprobs(answer, offset)
    return {
        "index": index, "text": text, "logprobs": logprobs, "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
    }, offset  # fmt: skip


def _logprobs(answer: CompletionOutput, offset: int) -> tuple[_Lists | None, int]:
    if answer.logprobs is None:
        return None, offset
    found = _lists()
    for token, each in zip(answer.token_ids, answer.logprobs, strict=True):
        text = each[token].decoded_token or ""
        _append(found, offset, text, token, each)
        offset += len(text)
    return found, offset


def _of_prompt(asked: CheckedRequest, text: str, scores: Sequence[TokenLogprobs | None]) -> _Lists:
    """Return the offsets, texts and log-probabilities of a prompt's tokens. The first token has no log-probability."""
    found = _lists()
    offsets = _offsets(asked, text)
    for offset, token, each in zip(offsets, asked.prompt_ids, scores, strict=True):
        told = str(asked.reader.tokenizer.decode([token])) if each is None else each[token].decoded_token or ""
        _append(found, offset, told, token, each)
    return found


def _offsets(asked: CheckedRequest, text: str) -> Iterator[int]:
    """Yield the offset of each prompt token in the text. A token that is not in the text gets the next one's offset."""
    reader, at = Detokenizer(asked.reader.tokenizer, (), skip_special_tokens=False), 0
    for token in asked.prompt_ids:
        yield at
        piece = reader.add(token)
        at += next((len(each) for each in (piece, piece.lstrip()) if text.startswith(each, at)), 0)


def _lists() -> _Lists:
    return {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}


def _append(found: _Lists, offset: int, text: str, token: int, scores: TokenLogprobs | None) -> None:
    found["text_offset"].append(offset)
    found["tokens"].append(text)
    found["token_logprobs"].append(None if scores is None else scores[token].logprob)
    found["top_logprobs"].append(None if scores is None else _likeliest(scores))


def _likeliest(scores: TokenLogprobs) -> dict[str, float]:
    """Return log-probabilities by text. If several tokens have one text, the largest log-probability counts."""
    found = dict[str, float]()
    for each in scores.values():
        text = each.decoded_token or ""
        found[text] = max(each.logprob, found.get(text, each.logprob))
    return found
