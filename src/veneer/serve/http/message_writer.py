"""Message during generation: its object, and the events of its stream."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

from pydantic_core import from_json

from veneer.errors import VeneerError
from veneer.serve.http.errors import message_error
from veneer.serve.http.writing import Event, parts_of
from veneer.serve.requests.calls import Calls
from veneer.serve.requests.checked import CheckedRequest
from veneer.serve.schedule.outputs import CompletionOutput, RequestOutput
from veneer.serve.tool_calls.parser import Arguments, Begun, Ended, Text


class MessageWriter:
    """`Writer` of the message that answers a checked request: blocks of text and calls, one at a time."""

    def __init__(self, model: str, asked: CheckedRequest, calls: Calls | None) -> None:
        self._head = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "model": model}
        self._asked = asked
        self._parser = None if calls is None else calls.parser()
        self._blocks: list[dict[str, Any]] = []
        self._arguments = ""  # of the open call
        self._open = ""  # the type of the open block
        self._end: dict[str, str | None] = {"stop_reason": None, "stop_sequence": None}
        self._n_answered = self._n_cached = 0

    def whole(self) -> dict[str, Any]:
        """Return the message as it is now."""
        return self._head | {"content": self._blocks} | self._end | {"usage": self._usage()}

    def begin(self) -> Iterator[Event]:
        """Yield the first event."""
        yield {"type": "message_start", "message": self.whole()}

    def take(self, output: RequestOutput) -> Iterator[Event]:
        """Add the text and calls of an output of the engine, which may be a part of the answer or all of it. Yield
        their events.
        """
        for answer in output.outputs:
            self._n_answered += len(answer.token_ids)
            yield from self._write(answer)
            if answer.finished():
                self._n_cached = output.num_cached_tokens
                yield from self._close()
                self._end = self._reason(answer)
                yield {"type": "message_delta", "delta": self._end, "usage": self._usage()}
                yield {"type": "message_stop"}

    def fail(self, error: VeneerError) -> Iterator[Event]:
        """End the stream with an error."""
        yield message_error(error)

    def _write(self, answer: CompletionOutput) -> Iterator[Event]:
        for part in parts_of(answer, self._parser):
            match part:
                case Text(text):
                    if self._open != "text":
                        yield from self._begin({"type": "text", "text": ""})
                    self._blocks[-1]["text"] += text
                    yield self._delta({"type": "text_delta", "text": text})
                case Begun(_, id, name):
                    yield from self._begin({"type": "tool_use", "id": id, "name": name, "input": {}})
                case Arguments(_, text):
                    self._arguments += text
                    yield self._delta({"type": "input_json_delta", "partial_json": text})
                case Ended():
                    yield from self._close()

    def _begin(self, block: dict[str, Any]) -> Iterator[Event]:
        yield from self._close()
        self._blocks.append(block)
        self._open, self._arguments = str(block["type"]), ""
        yield {"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}

    def _close(self) -> Iterator[Event]:
        """End the open block, if there is one."""
        if not self._open:
            return
        if self._open == "tool_use":
            self._blocks[-1]["input"] = _object(self._arguments)
        self._open = ""
        yield {"type": "content_block_stop", "index": len(self._blocks) - 1}

    def _reason(self, answer: CompletionOutput) -> dict[str, str | None]:
        if answer.finish_reason == "length":
            is_full = self._n_answered < (self._asked.params.max_tokens or 0)
            return {"stop_reason": "model_context_window_exceeded" if is_full else "max_tokens", "stop_sequence": None}
        if isinstance(answer.stop_reason, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": answer.stop_reason}
        called = self._parser is not None and self._parser.is_called
        return {"stop_reason": "tool_use" if called else "end_turn", "stop_sequence": None}

    def _usage(self) -> dict[str, int]:
        return {
            "input_tokens": len(self._asked.prompt_ids) - self._n_cached, "output_tokens": self._n_answered,
            "cache_creation_input_tokens": 0, "cache_read_input_tokens": self._n_cached,
        }  # fmt: skip


def _object(text: str) -> dict[str, Any]:
    """Parse a call's arguments from JSON text, which may be cut off: arguments that are complete or begun are kept.

    Return an empty dict if the text is not a JSON object.
    """
    try:
        found = from_json(text, allow_partial="trailing-strings")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
