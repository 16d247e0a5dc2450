"""Keys of a part checked against the allowed ones: unknown keys, missing keys, values of another type."""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from veneer.plain.nearest import nearest
from veneer.plain.refusals import by_place, unfit


@dataclass(frozen=True)
class AllowedKeys:
    """Keys that a part may hold: the type of each, and the required ones."""

    types: Mapping[str, Any]
    required: frozenset[str] = frozenset()


@functools.cache
def keys_of(cls: type) -> AllowedKeys:
    """Return the keys that are fields of a dataclass."""
    hints, own = typing.get_type_hints(cls), [spec for spec in fields(cls) if spec.init]
    needed = (spec.name for spec in own if spec.default is MISSING and spec.default_factory is MISSING)
    return AllowedKeys({spec.name: hints[spec.name] for spec in own}, frozenset(needed))


def typed(
    keys: AllowedKeys,
    given: Mapping[str, Any],
    problems: list[str],
    prefix: str = "",
    advice: Callable[[str], str] = lambda key: "",
    beside: Iterable[str] = (),
) -> dict[str, Any]:
    """Return values converted to the types of their keys; add unknown keys and values that do not fit to ``problems``.

    ``advice`` returns the end of a message about an unknown key. If it is empty, the message names the nearest key of
    ``keys`` and ``beside``.
    """
    found: dict[str, Any] = {}
    for key, value in given.items():
        if key not in keys.types:
            near = advice(str(key)) or perhaps(key, [*keys.types, *beside])
            problems.append(f"{prefix}{key}: unknown key{near}")
            continue
        try:
            found[key] = _converted(value, keys.types[key])
        except ValidationError as error:
            problems += _misfits(f"{prefix}{key}", value, error)
        except PydanticSchemaGenerationError:
            found[key] = value  # a type that pydantic does not know; the config checks it itself
    return found


def _misfits(key: str, value: Any, error: ValidationError) -> list[str]:
    """Return a problem for each invalid entry inside a value, with the entry's path. If the value itself is invalid,
    return one problem.
    """
    return [
        f"{'.'.join(map(str, (key, *place)))}: {unfit(of[0]['input'], of)}"
        for place, of in by_place(value, error.errors()).items()
    ]


_WORDS_OF_YAML = {False: ("no", "off"), True: ("yes", "on")}
"""Words that YAML reads as true or false where they are not quoted."""


def _converted(value: Any, hint: Any) -> Any:
    """Convert a value to its type. Raises pydantic's ValidationError."""
    words = _WORDS_OF_YAML[value] if isinstance(value, bool) else ()
    meant = [word for word in words if word in _choices(hint)]
    return TypeAdapter(hint).validate_python(meant[0] if meant else value)


def _choices(hint: Any) -> list[Any]:
    """Return the values that a Literal or an Enum allows; for a union, those of all its members. The list is empty for
    other types.
    """
    if typing.get_origin(hint) is Literal:
        return list(typing.get_args(hint))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return [member.value for member in hint]
    return [word for part in typing.get_args(hint) for word in _choices(part)]


def missing(keys: AllowedKeys, given: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return a problem for every required key that is missing."""
    return [f"{prefix}{key}: is missing" for key in keys.types if key in keys.required and key not in given]


# Names that other libraries give to these fields.
_OTHER_WORDS = {
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
}


def means_another(key: str, known: Iterable[str]) -> bool:
    """Return True if the key is another library's name for a known one."""
    return _OTHER_WORDS.get(key) in set(known)


_MOST_NAMED = 40  # keys in a message


def perhaps(key: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown key: the key that was probably meant. If no key is similar, the text
    lists all keys, or says where they are listed.
    """
    names, meant = list(known), _OTHER_WORDS.get(str(key))
    found = [meant] if meant in names else nearest(str(key), names, n=1)
    if found:
        return f"; the nearest is {found[0]!r}"
    if len(names) <= _MOST_NAMED:
        return f"; known: {', '.join(names)}"
    return f"; `veneer train --print-recipe` shows the usual ones of {len(names)}"
