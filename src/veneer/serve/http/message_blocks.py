"""Content blocks of ``/v1/messages`` as the messages of a chat completion."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

from veneer.serve.http.errors import RefusedError
from veneer.serve.http.protocol import Strict

_ROLES = ("user", "assistant", "system")
_OF_MESSAGE = {"role", "content"}
_OF_BLOCK = {
    "text": {"type", "text", "cache_control", "citations"},
    "tool_use": {"type", "id", "name", "input", "cache_control", "caller"},
    "tool_result": {"type", "tool_use_id", "content", "is_error", "cache_control"},
}
_READ = {"user": ("text", "tool_result"), "assistant": ("text", "tool_use"), "system": ("text",)}


class TextBlock(Strict):
    """Text block of the system prompt. ``cache_control`` and ``citations`` are ignored."""

    type: Literal["text"]
    text: str
    cache_control: dict[str, Any] | None = None
    citations: list[Any] | None = None


def messages_of(
    system: str | Sequence[TextBlock] | None, messages: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return the conversation of a body. Raises RefusedError, which names the invalid message or block.

    Consecutive messages of one role become one turn. Tool results in a user's message become messages of the role
    "tool" before its text.
    """
    told = system if system is None or isinstance(system, str) else "\n".join(block.text for block in system)
    found: list[dict[str, Any]] = [] if told is None else [{"role": "system", "content": [told]}]
    if not messages:
        raise RefusedError("messages is empty: give at least one, as {'role': 'user', 'content': '…'}", "messages")
    names: dict[str, str] = {}  # of functions, by call
    for number, message in enumerate(messages):
        for turn in _turns(f"messages.{number}", message, names):
            if found and turn["role"] == found[-1]["role"] != "tool":
                found[-1]["content"].append(turn["content"])
                if "tool_calls" in turn:
                    found[-1].setdefault("tool_calls", []).extend(turn["tool_calls"])
            else:
                found.append(turn | {"content": [turn["content"]]})
    return [turn | {"content": "\n".join(filter(None, turn["content"]))} for turn in found]


def _turns(place: str, message: Mapping[str, Any], names: dict[str, str]) -> Iterator[dict[str, Any]]:
    _require_known(place, message, _OF_MESSAGE)
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        raise RefusedError(f"{place}.role={role!r:.100} is unknown: give one of {', '.join(_ROLES)}", f"{place}.role")
    texts, calls = list[str](), list[dict[str, Any]]()
    for where, block in _blocks(f"{place}.content", content, _READ[role]):
        match block["type"]:
            case "text":
                texts.append(_text(where, block, "text"))
            case "tool_use":
                calls.append(_call(where, block))
                names[calls[-1]["id"]] = calls[-1]["function"]["name"]
            case "tool_result":
                yield _result(where, block, names)
    if texts or calls or not isinstance(content, Sequence) or not content:
        yield {"role": role, "content": "\n".join(texts)} | ({"tool_calls": calls} if calls else {})


def _blocks(place: str, content: Any, read: Collection[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield each block of a message's content, with its path in the body for errors."""
    if isinstance(content, str):
        yield place, {"type": "text", "text": content}
        return
    if not isinstance(content, Sequence):
        raise RefusedError(
            f"{place}={content!r:.100} is not a message's content: give text, or a list of blocks ({', '.join(read)})",
            place,
        )
    for number, block in enumerate(content):
        where = f"{place}.{number}"
        kind = block.get("type") if isinstance(block, Mapping) else None
        if not isinstance(kind, str) or kind not in read:
            raise RefusedError(
                f"{where}.type={kind!r:.100} is not read here: give {' or '.join(read)}", f"{where}.type"
            )
        _require_known(where, block, _OF_BLOCK[kind])
        yield where, block


def _call(place: str, block: Mapping[str, Any]) -> dict[str, Any]:
    id, name, given = _text(place, block, "id"), _text(place, block, "name"), block.get("input")
    if not isinstance(given, Mapping):
        raise RefusedError(
            f"{place}.input={given!r:.100} is not an object: give the arguments of the call by name", f"{place}.input"
        )
    arguments = json.dumps(given, ensure_ascii=False)
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _result(place: str, block: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    id = _text(place, block, "tool_use_id")
    if id not in names:
        raise RefusedError(
            f"{place}.tool_use_id={id!r:.100} names no earlier tool_use: send the assistant's message with the call",
            f"{place}.tool_use_id",
        )
    blocks = _blocks(f"{place}.content", block.get("content") or "", ("text",))
    content = "\n".join(_text(where, each, "text") for where, each in blocks)
    return {"role": "tool", "tool_call_id": id, "name": names[id], "content": content}


def _text(place: str, block: Mapping[str, Any], field: str) -> str:
    if not isinstance(block.get(field), str):
        raise RefusedError(f"{place}.{field}={block.get(field)!r:.100} is not text: give a string", f"{place}.{field}")
    return str(block[field])


def _require_known(place: str, given: Mapping[str, Any], known: Collection[str]) -> None:
    unknown = next((name for name, value in given.items() if name not in known and value is not None), None)
    if unknown is not None:
        raise RefusedError(
            f"unknown field '{place}.{unknown:.100}': there are {', '.join(sorted(known))}", f"{place}.{unknown:.100}"
        )
