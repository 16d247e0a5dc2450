"""Response while it is written: its object, and the events of its stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any

from veneer.errors import VeneerError
from veneer.serve.asked import Asked
from veneer.serve.http.chat import logprobs_of
from veneer.serve.http.errors import status_of
from veneer.serve.http.response_body import ResponsesBody
from veneer.serve.http.writing import Event
from veneer.serve.outputs import CompletionOutput, RequestOutput

_CODES = {400: "invalid_prompt", 429: "rate_limit_exceeded"}
_KEPT = ("instructions", "max_output_tokens", "top_logprobs", "user")


class ResponseWriter:
    """`Writer` of the response to a checked request."""

    def __init__(self, body: ResponsesBody, asked: Asked, model: str) -> None:
        self._body, self._asked = body, asked
        self._head = {
            "id": f"resp_{uuid.uuid4().hex}", "object": "response", "created_at": int(time.time()), "model": model,
            **{name: getattr(body, name) for name in _KEPT},
            "metadata": body.metadata or {}, "text": {"format": body.format}, "temperature": asked.params.temperature,
            "top_p": asked.params.top_p, "tools": body.tools or [], "tool_choice": body.tool_choice or "auto",
            "parallel_tool_calls": body.parallel_tool_calls is not False, "truncation": "disabled",
            "background": False, "store": False, "previous_response_id": None,
        }  # fmt: skip
        self._status, self._error, self._reason = "in_progress", dict[str, str](), ""
        self._output: list[dict[str, Any]] = []
        self._usage: dict[str, Any] | None = None
        self._n_events = self._n_answered = 0

    def whole(self) -> dict[str, Any]:
        """Return the response as it is now."""
        return self._head | {
            "status": self._status, "error": self._error or None, "output": self._output, "usage": self._usage,
            "incomplete_details": {"reason": self._reason} if self._reason else None,
        }  # fmt: skip

    def begin(self) -> Iterator[Event]:
        """Yield the first events."""
        for kind in ("created", "in_progress"):
            yield self._event(f"response.{kind}", response=self.whole())

    def take(self, output: RequestOutput) -> Iterator[Event]:
        """Add the next part of the answer, or all of it."""
        for answer in output.outputs:
            self._n_answered += len(answer.token_ids)
            yield from self._write(answer)
            if answer.finished():
                self._use(output.num_cached_tokens)
                yield from self._end(answer)

    def fail(self, error: VeneerError) -> Iterator[Event]:
        """End the response with an error."""
        self._status = "failed"
        self._error = {"code": _CODES.get(status_of(error), "server_error"), "message": str(error)}
        yield self._event("response.failed", response=self.whole())

    def _write(self, answer: CompletionOutput) -> Iterator[Event]:
        scores = logprobs_of(answer, self._asked.params.logprobs or 0) if self._body.scores else []
        if not answer.text and not scores:
            return
        if not self._output:
            yield from self._open()
        part = self._output[-1]["content"][0]
        part["text"] += answer.text
        part["logprobs"] += scores
        yield self._event("response.output_text.delta", **self._place, delta=answer.text, logprobs=scores)

    def _open(self) -> Iterator[Event]:
        """Begin the message."""
        item: dict[str, Any] = {
            "type": "message", "id": f"msg_{uuid.uuid4().hex}", "role": "assistant", "status": "in_progress",
            "content": [],
        }  # fmt: skip
        self._output.append(item)
        yield self._event("response.output_item.added", output_index=0, item=item)
        item["content"].append({"type": "output_text", "text": "", "annotations": [], "logprobs": []})
        yield self._event("response.content_part.added", **self._place, part=item["content"][0])

    def _end(self, answer: CompletionOutput) -> Iterator[Event]:
        if not self._output:
            yield from self._open()
        item = self._output[-1]
        part = item["content"][0]
        self._status = item["status"] = "completed" if answer.finish_reason == "stop" else "incomplete"
        self._reason = "max_output_tokens" if answer.finish_reason == "length" else ""
        yield self._event("response.output_text.done", **self._place, text=part["text"], logprobs=part["logprobs"])
        yield self._event("response.content_part.done", **self._place, part=part)
        yield self._event("response.output_item.done", output_index=0, item=item)
        yield self._event(f"response.{self._status}", response=self.whole())

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1, "content_index": 0}

    def _use(self, n_cached: int) -> None:
        n_prompt = len(self._asked.prompt_ids)
        self._usage = {
            "input_tokens": n_prompt, "output_tokens": self._n_answered, "total_tokens": n_prompt + self._n_answered,
            "input_tokens_details": {"cached_tokens": n_cached, "cache_write_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": 0},
        }  # fmt: skip

    def _event(self, kind: str, **fields: Any) -> Event:
        self._n_events += 1
        return {"type": kind, "sequence_number": self._n_events - 1, **fields}
