"""Calls of openai's and anthropic's clients, as users make them, and the forms that they ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import anthropic
import openai
import pytest
from pydantic import BaseModel

from .test_server import Server

TURN: Any = {"role": "user", "content": "x"}
CHAT: Any = {"model": "tiny", "messages": [TURN], "max_tokens": 5}
TEXT: Any = {"model": "tiny", "prompt": "abc", "max_tokens": 5}
RESPONSE: Any = {"model": "tiny", "input": "x", "max_output_tokens": 16}
MESSAGE: Any = {"model": "tiny", "messages": [TURN], "max_tokens": 5}
PICTURE = "data:image/png;base64,iVBORw0KGgo="


class Paint(BaseModel):
    """Paint a wall."""

    colour: Literal["red", "blue"]


SCHEMA: Any = {
    "type": "object", "properties": {"colour": {"type": "string", "enum": ["red", "blue"]}}, "required": ["colour"],
    "additionalProperties": False,
}  # fmt: skip
TOOL: Any = {"type": "function", "function": {"name": "Paint", "description": "Paints.", "parameters": SCHEMA}}
NAMED: Any = {"type": "function", "function": {"name": "Paint"}}
FORM: Any = {"type": "json_schema", "json_schema": {"name": "paint", "schema": SCHEMA, "strict": True}}
BLANKS: Any = {str(ord(c)): -100 for c in " \t\n\r"}
USED: Any = {"name": "Paint", "description": "Paints.", "input_schema": SCHEMA}
FUNCTION: Any = {"type": "function", "name": "Paint", "parameters": SCHEMA, "strict": True}


@dataclass(frozen=True)
class Clients:
    """The clients of one server, as their users make them."""

    server: Server

    @property
    def openai(self) -> openai.OpenAI:
        return self.server.client

    @property
    def openai_async(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.server.url}/v1", api_key="none", max_retries=0)

    @property
    def anthropic(self) -> anthropic.Anthropic:
        return anthropic.Anthropic(base_url=self.server.url, api_key="none", max_retries=0)

    @property
    def anthropic_async(self) -> anthropic.AsyncAnthropic:
        return anthropic.AsyncAnthropic(base_url=self.server.url, api_key="none", max_retries=0)

    @contextmanager
    def held(self) -> Iterator[dict[str, Any]]:
        """An engine whose long answers do not end, and the keys that ask for one: a client's timeout comes first."""
        with pytest.MonkeyPatch.context() as patch:
            self.server.hold(patch)
            yield {"max_tokens": 60, "extra_body": {"ignore_eos": True}}

    def chat(self, **given: Any) -> Any:
        return self.openai.chat.completions.create(**CHAT | given)

    def text(self, **given: Any) -> Any:
        return self.openai.completions.create(**TEXT | given)

    def respond(self, **given: Any) -> Any:
        return self.openai.responses.create(**RESPONSE | given)

    def message(self, **given: Any) -> Any:
        return self.anthropic.messages.create(**MESSAGE | given)


Call = Callable[[Clients], None]


class Calls:
    """The calls of one file: those that behave as with the original, and those that are refused, with the reason."""

    def __init__(self) -> None:
        self.alike_by_name: dict[str, Call] = {}
        self.refused_by_name: dict[str, tuple[Call, str]] = {}

    def alike(self, name: str) -> Callable[[Call], Call]:
        return lambda call: self.alike_by_name.setdefault(name, call)

    def refused(self, name: str, said: str, call: Call) -> None:
        self.refused_by_name[name] = (call, said)

    def require_refused(self, name: str, clients: Clients) -> None:
        call, said = self.refused_by_name[name]
        with pytest.raises((openai.BadRequestError, anthropic.BadRequestError)) as told:
            call(clients)
        assert said in str(told.value)
