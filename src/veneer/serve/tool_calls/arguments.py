"""Arguments of one call, streamed as JSON: from a JSON object, or from fields written one by one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from veneer.serve.tool_calls.format import Fields, joined
from veneer.serve.tool_calls.match import Growing, Slot, match

_KINDS: Mapping[type, tuple[str, ...]] = {
    str: ("string",), bool: ("boolean",), int: ("integer", "number"), float: ("number", "integer"),
    dict: ("object",), list: ("array",), type(None): ("null",),
}  # fmt: skip
_OUTSIDE, _IN_STRING = re.compile(r'["{}\[\]]'), re.compile(r'["\\]')
_PYTHONS = {"True": True, "False": False, "None": None}  # as some templates print values


@dataclass(frozen=True, slots=True)
class Read:
    """JSON read from a text, the number of characters consumed, and whether the arguments end there."""

    json: str
    n: int
    ended: bool


class ObjectArguments:
    """Arguments that are a JSON object, passed on as the model writes them."""

    def __init__(self) -> None:
        self._depth, self._in_string, self._escaped = 0, False, False

    @property
    def is_in_string(self) -> bool:
        """Return True if the text read so far ends within a string."""
        return self._in_string

    def read(self, text: str, *, final: bool) -> Read:
        """Read the next piece."""
        at = int(self._escaped and bool(text))
        self._escaped = self._escaped and not text
        while (found := (_IN_STRING if self._in_string else _OUTSIDE).search(text, at)) is not None:
            at, mark = found.end(), found[0]
            if mark == "\\":
                self._escaped = at == len(text)
                at += 1
            elif mark == '"':
                self._in_string = not self._in_string
            else:
                self._depth += 1 if mark in "{[" else -1
                if self._depth == 0:
                    return Read(text[:at], at, True)
        return Read(text, len(text), False)


class FieldArguments:
    """Arguments written as fields, the first named ``key``. ``schema`` is the JSON schema of all arguments.

    If a value's schema allows only strings, the value is a string, streamed in pieces. Other values are passed on
    whole: as JSON if the text is JSON of a kind that the schema allows, otherwise as a string.
    """

    def __init__(self, fields: Fields, schema: Mapping[str, Any], key: str) -> None:
        self._fields, self._schema = fields, schema
        self._next = joined(fields.next.strip(), Slot.KEY, fields.middle)
        self._lead, self._trail = _blank_end(fields.middle), _blank_begin(fields.last)
        self._json = ""
        self._open("{", key)

    def read(self, text: str, *, final: bool) -> Read:
        """Read the next piece."""
        at, end = 0, self._fields.end
        while True:
            found = text.find(end, at)
            if found >= 0 and self._goes_on_in_string(text[at:found]):
                self._value += text[at : found + 1]
                at = found + 1
                continue
            if found < 0:
                kept = len(text) if final else len(text) - _overlap(text[at:], end)
                self._value += text[at:kept]
                at = kept
                break
            more = match(self._next, text, found, (), final=final)
            self._value += text[at:found]
            at = found
            if isinstance(more, Growing):
                break
            if more is None:
                self._close("}")
                return Read(self._told(), found + len(end), True)
            self._close("")
            self._open(", ", more.values[Slot.KEY])
            at = more.end
        self._tell_more()
        if final:
            self._close("")
        return Read(self._told(), at, False)

    def _open(self, front: str, key: str) -> None:
        schema = self._schema.get("properties", {}).get(key)
        self._kinds = kinds_of(schema)
        self._value, self._begun = "", False
        self._scan, self._n_scanned, self._first, self._is_whole = ObjectArguments(), 0, "", False  # as JSON
        self._json += f"{front}{_quoted(key)}: "

    def _goes_on_in_string(self, more: str) -> bool:
        """Return True if a JSON value goes on after ``more``, because a string in it is still open."""
        if self._kinds == {"string"}:
            return False
        new = self._value[self._n_scanned :] + more  # each character once: values are long
        self._n_scanned += len(new)
        self._first = self._first or new.lstrip()[:1]
        self._is_whole = self._is_whole or self._scan.read(new, final=True).ended
        return self._first in ("{", "[", '"') and not self._is_whole and self._scan.is_in_string

    def _tell_more(self) -> None:
        """Append the new characters of a string argument to the JSON, except those that may begin the text after the
        string.
        """
        if self._kinds != {"string"}:
            return
        if not self._begun:
            if self._lead.startswith(self._value):
                return
            self._value, self._begun = self._value.removeprefix(self._lead), True
            self._json += '"'
        kept = len(self._value) - _overlap(self._value, f"{self._trail}\0")
        self._json += _quoted(self._value[:kept])[1:-1]
        self._value = self._value[kept:]

    def _close(self, behind: str) -> None:
        value = self._value if self._begun else self._value.removeprefix(self._lead)
        told = _json_of(value.removesuffix(self._trail), self._kinds)
        self._json += (told[1:] if self._begun else told) + behind

    def _told(self) -> str:
        told, self._json = self._json, ""
        return told


def kinds_of(schema: Any, depth: int = 4) -> set[str]:
    """Return the kinds of JSON values that a schema allows; empty if it does not say. ``schema`` may be any JSON."""
    if not isinstance(schema, Mapping):
        return set()
    kind = schema.get("type")
    kinds = {each for each in ([kind] if isinstance(kind, str) else _listed(kind)) if isinstance(each, str)}
    if not kinds:
        values = [*_listed(schema.get("enum")), *([schema["const"]] if "const" in schema else [])]
        kinds = {name for value in values for name in _KINDS.get(type(value), ())}
    for each in (*_listed(schema.get("anyOf")), *_listed(schema.get("oneOf"))) if depth else ():
        kinds |= kinds_of(each, depth - 1)
    return kinds


def _listed(given: Any) -> list[Any]:
    return given if isinstance(given, list) else []


def _json_of(text: str, kinds: set[str]) -> str:
    """Return the JSON of a field's text: the value that the text expresses if its type is in ``kinds``, else a JSON
    string.
    """
    written = text.strip()
    if kinds == {"string"}:
        return _quoted(text)
    try:
        value = _PYTHONS[written] if written in _PYTHONS else json.loads(written, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _quoted(text)
    if kinds and kinds.isdisjoint(_KINDS[type(value)]):
        return _quoted(text)
    return json.dumps(value, ensure_ascii=False) if written in _PYTHONS else written


def _refuse(constant: str) -> None:
    """Refuse NaN and infinities, which JSON does not have."""
    raise ValueError(constant)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _blank_end(text: str) -> str:
    return text[len(text.rstrip()) :]


def _blank_begin(text: str) -> str:
    return text[: len(text) - len(text.lstrip())]


def _overlap(text: str, end: str) -> int:
    """Return how many characters at the end of a text may begin ``end``."""
    return next((n for n in range(min(len(end) - 1, len(text)), 0, -1) if text.endswith(end[:n])), 0)
