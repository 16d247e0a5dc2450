"""Keys of a file checked against the fields of a dataclass: unknown ones, missing ones, values of another type."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields
from enum import Enum
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from veneer.core.nearest import nearest


def typed(
    cls: type,
    given: Mapping[str, Any],
    problems: list[str],
    prefix: str = "",
    advice: Callable[[str], str] = lambda key: "",
    beside: Iterable[str] = (),
) -> dict[str, Any]:
    """Values converted to the types of a dataclass's fields; what cannot be, and unknown keys, become problems.

    ``advice``: the end of a message about an unknown key; where it has nothing to say, the nearest key is named, of the
    fields or of the keys that stand ``beside`` them.
    """
    hints = typing.get_type_hints(cls)
    known = {f.name for f in fields(cls) if f.init}
    found: dict[str, Any] = {}
    for key, value in given.items():
        if key not in known:
            problems.append(f"{prefix}{key}: unknown key{advice(str(key)) or perhaps(key, [*known, *beside])}")
            continue
        try:
            found[key] = _converted(value, hints[key])
        except ValidationError as error:
            reasons = dict.fromkeys(each["msg"] for each in error.errors())
            problems.append(f"{prefix}{key}: {value!r} does not fit ({' or '.join(reasons)})")
        except PydanticSchemaGenerationError:
            found[key] = value  # a type that pydantic does not know; the config checks it itself
    return found


_WORDS_OF_YAML = {False: ("no", "off"), True: ("yes", "on")}
"""Words that YAML reads as true or false where they are not quoted."""


def _converted(value: Any, hint: Any) -> Any:
    """A value as its type has it. Raises pydantic's ValidationError."""
    words = _WORDS_OF_YAML[value] if isinstance(value, bool) else ()
    meant = [word for word in words if word in _choices(hint)]
    return TypeAdapter(hint).validate_python(meant[0] if meant else value)


def _choices(hint: Any) -> list[Any]:
    """The words of a type that lists them, or of the parts of a union that do."""
    if typing.get_origin(hint) is Literal:
        return list(typing.get_args(hint))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return [member.value for member in hint]
    return [word for part in typing.get_args(hint) for word in _choices(part)]


def missing(cls: type, given: Mapping[str, Any], prefix: str = "") -> list[str]:
    """A problem for every field without a default that is not given."""
    needed = [f for f in fields(cls) if f.init and f.default is MISSING and f.default_factory is MISSING]
    return [f"{prefix}{f.name}: is missing" for f in needed if f.name not in given]


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
    """True for a key by which other libraries mean one that is known."""
    return _OTHER_WORDS.get(key) in set(known)


def perhaps(key: str, known: Iterable[str]) -> str:
    """The end of a message that names the key which was perhaps meant."""
    names, meant = list(known), _OTHER_WORDS.get(str(key))
    found = [meant] if meant in names else nearest(str(key), names, n=1)
    return f"; the nearest is {found[0]!r}" if found else ""
