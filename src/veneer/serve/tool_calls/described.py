"""Tools for a chat template without tool support: functions, calls and results become plain text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from veneer.serve.tool_calls.conversation import Conversation, text_of
from veneer.serve.tool_calls.functions import Function
from veneer.serve.tool_calls.messages import with_calls

_HEAD = """You may call these functions, each with its JSON schema:
"""
_TAIL = """
To call one, write its name and its arguments as JSON, on a line of its own:
{"name": "NAME", "arguments": {"ARGUMENT": "VALUE"}}
Several calls are several lines. The next message has the results."""
Place = Literal["system", "user"]
Turn = dict[str, Any]


def description_of(functions: Sequence[Function]) -> str:
    """Return a text that describes functions to a model, and the format in which to call them (`known.PLAIN`)."""
    told = [json.dumps(function.shown()["function"], ensure_ascii=False) for function in functions]
    return "\n".join([_HEAD.strip(), *told, _TAIL]) if told else ""


def as_text(messages: Conversation, description: str, place: Place) -> list[Turn]:
    """Return messages in which calls and results are text, with the description of the functions first.

    The description begins the system message or, if ``place`` is "user", the first user message. A result becomes a
    user turn. Consecutive results are joined to one turn, with a user message that follows them. Raises ConfigError.
    """
    names: dict[str, str] = {}  # of functions, by call
    found: list[Turn] = []
    for number, message in enumerate(with_calls(messages, None)):
        turn, is_result = _turn(number, message, names)
        if found and turn["role"] == found[-1]["role"] == "user" and (is_result or found[-1].get("is_result")):
            found[-1] = {**turn, "content": f"{found[-1]['content']}\n{turn['content']}", "is_result": True}
        else:
            found.append({**turn, "is_result": is_result})
    return _described([{k: v for k, v in turn.items() if k != "is_result"} for turn in found], description, place)


def _turn(number: int, message: Mapping[str, Any], names: dict[str, str]) -> tuple[Turn, bool]:
    """Return a message as a turn of plain text, and True if it is a tool's result. Add the names of its calls to
    ``names``.
    """
    content = text_of(number, message) or ""
    if message.get("tool_calls"):
        calls = [call["function"] for call in message["tool_calls"]]
        names |= {str(call.get("id")): call["function"]["name"] for call in message["tool_calls"]}
        lines = [json.dumps({"name": f["name"], "arguments": f["arguments"]}, ensure_ascii=False) for f in calls]
        return {"role": message["role"], "content": "\n".join([*filter(None, [content]), *lines])}, False
    if message["role"] == "tool":
        name = names.get(str(message.get("tool_call_id")), message.get("name"))
        front = f"Result of {name}:" if name else "Result:"
        return {"role": "user", "content": f"{front} {content}"}, True
    return {**message, "content": content}, False


def _described(turns: list[Turn], description: str, place: Place) -> list[Turn]:
    if not description or not turns:  # no turns are refused
        return turns
    number = next((i for i, turn in enumerate(turns) if turn["role"] == place), None)
    if number is None:
        return [{"role": place, "content": description}, *turns]
    front = [turns[number]["content"], description] if place == "system" else [description, turns[number]["content"]]
    return [*turns[:number], {**turns[number], "content": "\n\n".join(filter(None, front))}, *turns[number + 1 :]]
