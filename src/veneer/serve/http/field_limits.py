"""Limits of body fields by name: entries, values and characters. Fields not listed have the lowest limit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_LISTS = (list, tuple, dict)
_MANY = 32
MOST_LISTS = 1 << 14
"""Largest number of lists and objects at one level: checking more would block the event loop for 0.1 s."""


@dataclass(frozen=True, kw_only=True)
class FieldLimit:
    """Limit of one field.

    ``entries``: number of entries of the list or object itself. ``values``: number of values in it, nested ones too.
    ``characters``: length of all strings in it, keys too; None if only the limits of the body and of the model's
    context apply. ``levels``: depth of nesting. Each level has at most `MOST_LISTS` lists and objects.
    """

    entries: int = 1024
    values: int = 1024
    characters: int | None = 4096
    levels: int = 16

    def problem(self, value: Any) -> str | None:
        """Return the reason why a JSON value is too large, with its limit; None if it is not."""
        if isinstance(value, str):
            return self._too_long(len(value))
        if not isinstance(value, _LISTS):
            return None
        if len(value) > self.entries:
            return f"{len(value)} entries are too many: at most {self.entries} are allowed. Send fewer"
        return self._problem_within(value)

    def _problem_within(self, value: Any) -> str | None:
        layer, n_values, n_characters = [value], 0, 0
        for _ in range(self.levels):
            inner = list[Any]()
            for each in layer:
                n_values += len(each)
                if n_values > self.values:
                    return f"more than {self.values} values in its lists and objects are too many: send fewer"
                n_characters += _n_characters(each, inner)
            if (said := self._too_long(n_characters)) is not None:
                return said
            if len(inner) > MOST_LISTS:
                return f"more than {MOST_LISTS} lists and objects in it are too many: send fewer"
            if not inner:
                return None
            layer = inner
        return f"lists and objects in it are nested more than {self.levels} deep: flatten it"

    def _too_long(self, n: int) -> str | None:
        if self.characters is None or n <= self.characters:
            return None
        return f"{n} characters are too many: at most {self.characters} are allowed. Send fewer"


def _n_characters(given: Any, inner: list[Any]) -> int:
    """Count the characters of the texts in a list or an object. Append nested lists and objects to ``inner``."""
    n, values = 0, given
    if isinstance(given, dict):
        n, values = sum(len(name) for name in given if isinstance(name, str)), given.values()
    if len(given) > _MANY and {str, *_LISTS}.isdisjoint(map(type, values)):  # token ids
        return n
    for each, kind in zip(values, map(type, values), strict=True):  # their exact types: a million are quick
        if kind is str:
            n += len(each)
        elif kind is not int and kind in _LISTS:
            inner.append(each)
    return n


_IDS = FieldLimit(entries=1 << 20, values=1 << 20, characters=None)
_TALK = FieldLimit(entries=1 << 12, values=1 << 16, characters=None, levels=64)
_FORM = FieldLimit(values=1 << 13, characters=1 << 16, levels=64)
_STOP = FieldLimit(entries=64, characters=1 << 14)

FIELD_LIMITS: Mapping[str, FieldLimit] = {
    "prompt": _IDS, "input": FieldLimit(entries=1 << 20, values=1 << 20, characters=None, levels=64), "tokens": _IDS,
    "messages": _TALK, "system": _TALK, "instructions": _TALK,
    "text": FieldLimit(values=1 << 13, characters=None, levels=64),
    "structured_outputs": _FORM, "response_format": _FORM, "output_config": _FORM, "format": _FORM,
    "tools": FieldLimit(entries=128, values=1 << 14, characters=1 << 19, levels=64),
    "function": FieldLimit(values=1 << 13, characters=1 << 18, levels=64),
    "parameters": FieldLimit(values=1 << 13, characters=1 << 17, levels=64),
    "input_schema": FieldLimit(values=1 << 13, characters=1 << 17, levels=64),
    "description": FieldLimit(characters=1 << 16),
    "stop": _STOP, "stop_sequences": _STOP,
    "stop_token_ids": FieldLimit(), "allowed_token_ids": FieldLimit(entries=1 << 18, values=1 << 18),
    "bad_words": FieldLimit(characters=1 << 16), "logit_bias": FieldLimit(characters=1 << 16),
    "chat_template": FieldLimit(characters=1 << 17),
    "chat_template_kwargs": FieldLimit(values=1 << 13, characters=1 << 17, levels=32),
    "adapter": FieldLimit(characters=1 << 16), "metadata": FieldLimit(characters=1 << 16),
    **dict.fromkeys(("cache_salt", "lora_name", "lora_path"), FieldLimit(characters=None)),  # shorter, by their readers
    "prediction": FieldLimit(entries=16, values=1 << 10, characters=None),
}  # fmt: skip
"""Limits that differ from those of any other field."""
_OTHER = FieldLimit()


def limit_of(name: str) -> FieldLimit:
    """Return the limit of the body field with this name; a field without its own limit has the lowest one."""
    return FIELD_LIMITS.get(name, _OTHER)


def problem_of(name: str, value: Any) -> str | None:
    """Return the reason why the value of a field is too large; None if it is not."""
    return limit_of(name).problem(value)
