"""Response during generation: its object, and the events of its stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any

from veneer.errors import VeneerError
from veneer.serve.http.chat import logprobs_of
from veneer.serve.http.errors import status_of
from veneer.serve.http.response_body import ResponsesBody
from veneer.serve.http.writing import Event, parts_of
from veneer.serve.requests.calls import Calls
from veneer.serve.requests.checked import CheckedRequest
from veneer.serve.schedule.outputs import CompletionOutput, RequestOutput
from veneer.serve.tool_calls.parser import Arguments, Begun, Ended, Text

_CODES = {400: "invalid_prompt", 429: "rate_limit_exceeded"}
_KEPT = ("instructions", "max_output_tokens", "top_logprobs", "user")


class ResponseWriter:
    """`Writer` of the response to a checked request: its output items, each a message or a call, one at a time."""

    def __init__(self, body: ResponsesBody, model: str, asked: CheckedRequest, calls: Calls | None) -> None:
        self._scored, self._asked = body.scores, asked
        told = body.model_dump(include={"tools", "tool_choice"})
        self._head = {
            "id": f"resp_{uuid.uuid4().hex}", "object": "response", "created_at": int(time.time()), "model": model,
            **{name: getattr(body, name) for name in _KEPT},
            "metadata": body.metadata or {}, "text": {"format": body.format}, "temperature": asked.params.temperature,
            "top_p": asked.params.top_p, "tools": told["tools"] or [], "tool_choice": told["tool_choice"] or "auto",
            "parallel_tool_calls": body.parallel_tool_calls is not False, "truncation": "disabled",
            "background": False, "store": False, "previous_response_id": None,
        }  # fmt: skip
        self._parser = None if calls is None else calls.parser()
        self._status, self._error, self._reason = "in_progress", dict[str, str](), ""
        self._output: list[dict[str, Any]] = []
        self._scores: list[dict[str, Any]] = []  # of tokens whose text is held back
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
        """Add the text and calls of an output of the engine, which may be a part of the answer or all of it. Yield
        their events.
        """
        for answer in output.outputs:
            self._n_answered += len(answer.token_ids)
            if self._scored:
                self._scores += logprobs_of(answer, self._asked.params.logprobs or 0)
            yield from self._write(answer)
            if answer.finished():
                self._use(output.num_cached_tokens)
                yield from self._end(answer.finish_reason or "")

    def fail(self, error: VeneerError) -> Iterator[Event]:
        """End the response with an error."""
        self._status = "failed"
        self._error = {"code": _CODES.get(status_of(error), "server_error"), "message": str(error)}
        yield self._event("response.failed", response=self.whole())

    def _write(self, answer: CompletionOutput) -> Iterator[Event]:
        for part in parts_of(answer, self._parser):
            match part:
                case Text(text):
                    yield from self._say(text)
                case Begun(_, id, name):
                    yield from self._close("completed")
                    self._scores = []
                    call = {"type": "function_call", "call_id": id, "name": name, "arguments": ""}
                    yield self._open(call | {"id": f"fc_{uuid.uuid4().hex}"})
                case Arguments(_, text):
                    self._output[-1]["arguments"] += text
                    yield self._event("response.function_call_arguments.delta", **self._item, delta=text)
                case Ended():
                    yield from self._close("completed")

    def _say(self, text: str) -> Iterator[Event]:
        """Add text to the message. If none is open, begin one."""
        if self._kind != "message":
            yield self._open({"type": "message", "id": f"msg_{uuid.uuid4().hex}", "role": "assistant", "content": []})
            begun = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            self._output[-1]["content"].append(begun)
            yield self._event("response.content_part.added", **self._place, part=begun)
        part, scores, self._scores = self._output[-1]["content"][0], self._scores, []
        part["text"] += text
        part["logprobs"] += scores
        if text or scores:
            yield self._event("response.output_text.delta", **self._place, delta=text, logprobs=scores)

    def _open(self, item: dict[str, Any]) -> Event:
        self._output.append(item | {"status": "in_progress"})
        return self._event("response.output_item.added", output_index=self._last, item=self._output[-1])

    def _close(self, status: str) -> Iterator[Event]:
        """End the open item, if there is one."""
        kind, item = self._kind, self._output[-1] if self._output else {}
        if not kind:
            return
        item["status"] = status
        if kind == "message":
            [part] = item["content"]
            told = {"text": part["text"], "logprobs": part["logprobs"]}
            yield self._event("response.output_text.done", **self._place, **told)
            yield self._event("response.content_part.done", **self._place, part=part)
        else:
            told = {"name": item["name"], "arguments": item["arguments"]}
            yield self._event("response.function_call_arguments.done", **self._item, **told)
        yield self._event("response.output_item.done", output_index=self._last, item=item)

    def _end(self, reason: str) -> Iterator[Event]:
        if not self._output or (self._scores and self._kind == "message"):
            yield from self._say("")
        self._status = "completed" if reason == "stop" else "incomplete"
        self._reason = "max_output_tokens" if reason == "length" else ""
        yield from self._close(self._status)
        yield self._event(f"response.{self._status}", response=self.whole())

    @property
    def _kind(self) -> str:
        """Return the type of the open item; empty if none is open."""
        item = self._output[-1] if self._output else {"status": "none"}
        return str(item["type"]) if item["status"] == "in_progress" else ""

    @property
    def _last(self) -> int:
        return len(self._output) - 1

    @property
    def _item(self) -> dict[str, Any]:
        return {"item_id": self._output[-1]["id"], "output_index": self._last}

    @property
    def _place(self) -> dict[str, Any]:
        return {**self._item, "content_index": 0}

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
