"""Conversations with calls, as a chat template reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from veneer.errors import ConfigError
from veneer.serve.tool_calls.conversation import Conversation
from veneer.serve.tool_calls.format import CallFormat


def with_calls(messages: Conversation, format: CallFormat | None) -> list[Mapping[str, Any]]:
    """Return messages whose calls have the form that templates of a ``format`` read. If it is None, use the form that
    most templates read.

    Arguments are the text of a JSON object in OpenAI's API, and a mapping in most templates. Text that is not a JSON
    object stays text. An assistant message without content gets the content that the template expects. Raises
    ConfigError.
    """
    return [_with_calls(number, message, format) for number, message in enumerate(messages)]


def _with_calls(number: int, message: Mapping[str, Any], format: CallFormat | None) -> Mapping[str, Any]:
    calls = message.get("tool_calls") if isinstance(message, Mapping) else None
    if not calls:
        return message
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise ConfigError(f"messages[{number}].tool_calls={calls!r} must be a list of calls")
    as_text = format is not None and format.as_text
    read = [_call(f"messages[{number}].tool_calls[{i}]", call, as_text) for i, call in enumerate(calls)]
    content = message.get("content") or ("" if format is None else format.content)
    return {**message, "content": content, "tool_calls": read}


def _call(where: str, call: Any, as_text: bool) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ConfigError(f'{where} is not a call: give {{"id": …, "type": "function", "function": {{"name": …, …}}}}')
    given = function.get("arguments") or "{}"
    if not isinstance(given, (str, Mapping)):
        raise ConfigError(f"{where}.function.arguments={given!r} must be the text of a JSON object")
    mapping = given if isinstance(given, Mapping) else _object(given)
    if as_text:
        arguments: Any = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    else:
        arguments = given if mapping is None else mapping
    return {**call, "function": {**function, "arguments": arguments}}


def _object(text: str) -> Mapping[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
