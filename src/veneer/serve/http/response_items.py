"""Input items of ``/v1/responses`` as the messages of a conversation."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from veneer.serve.http.errors import RefusedError

_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
_TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}  # fields of their texts
_OF_MESSAGE = {"type", "role", "content", "id", "status", "phase"}
_OF_CALL = {"type", "call_id", "name", "arguments", "id", "status"}
_OF_OUTPUT = {"type", "call_id", "output", "id", "status"}
_OF_PART = {"type", "text", "refusal", "annotations", "logprobs"}


def messages_of(instructions: str | None, items: str | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the conversation of an input: text of the user, or items. Raises RefusedError, which names the item.

    ``instructions`` become the first system message. Messages of the role "developer" become system messages. Function
    calls join the preceding assistant message. Each output of a function refers to its call by id.
    """
    found: list[dict[str, Any]] = [] if instructions is None else [{"role": "system", "content": instructions}]
    if isinstance(items, str):
        return [*found, {"role": "user", "content": items}]
    if not items:
        raise RefusedError("input is empty: give text, or items such as {'role': 'user', 'content': '…'}", "input")
    names: dict[str, str] = {}  # of functions, by call
    for number, item in enumerate(items):
        place = f"input.{number}"
        match item.get("type", "message" if "role" in item else None):
            case "message":
                found.append(_message(place, item))
            case "function_call":
                call = _call(place, item)
                names[call["id"]] = call["function"]["name"]
                if not found or found[-1]["role"] != "assistant":
                    found.append({"role": "assistant", "content": ""})
                found[-1].setdefault("tool_calls", []).append(call)
            case "function_call_output":
                found.append(_output(place, item, names))
            case kind:
                raise RefusedError(
                    f"{place}.type={kind!r} is not read: message, function_call and function_call_output are",
                    f"{place}.type",
                )
    return found


def _message(place: str, item: Mapping[str, Any]) -> dict[str, Any]:
    _require_known(place, item, _OF_MESSAGE)
    role = _text(place, item, "role")
    if role not in _ROLES:
        raise RefusedError(f"{place}.role={role!r} must be one of {', '.join(_ROLES)}", f"{place}.role")
    return {"role": _ROLES[role], "content": _content(f"{place}.content", item.get("content"))}


def _call(place: str, item: Mapping[str, Any]) -> dict[str, Any]:
    _require_known(place, item, _OF_CALL)
    id, name, arguments = (_text(place, item, field) for field in ("call_id", "name", "arguments"))
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _output(place: str, item: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    _require_known(place, item, _OF_OUTPUT)
    id = _text(place, item, "call_id")
    if id not in names:
        raise RefusedError(
            f"{place}.call_id={id!r} names no earlier function_call: send the call first", f"{place}.call_id"
        )
    content = _content(f"{place}.output", item.get("output"))
    return {"role": "tool", "tool_call_id": id, "name": names[id], "content": content}


def _content(place: str, given: Any) -> str:
    """Return the text of an item's content. The texts of several parts are on separate lines."""
    if isinstance(given, str):
        return given
    if not isinstance(given, Sequence):
        raise RefusedError(f"{place} must be text or a list of parts", place)
    return "\n".join(_part(f"{place}.{number}", part) for number, part in enumerate(given))


def _part(place: str, part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str) or kind not in _TEXTS:
        raise RefusedError(f"{place}.type={kind!r} is not read: {', '.join(_TEXTS)} are", f"{place}.type")
    _require_known(place, part, _OF_PART)
    return _text(place, part, _TEXTS[kind])


def _text(place: str, item: Mapping[str, Any], field: str) -> str:
    if not isinstance(item.get(field), str):
        raise RefusedError(f"{place}.{field} must be text", f"{place}.{field}")
    return str(item[field])


def _require_known(place: str, item: Mapping[str, Any], known: Collection[str]) -> None:
    unknown = next((name for name, value in item.items() if name not in known and value is not None), None)
    if unknown is not None:
        raise RefusedError(
            f"unknown field '{place}.{unknown}': there are {', '.join(sorted(known))}", f"{place}.{unknown}"
        )
