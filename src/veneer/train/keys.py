"""Keys of a file checked against the fields of a dataclass: unknown ones, missing ones, values of another type."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import MISSING, fields
from typing import Any

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
            found[key] = _converted(value, TypeAdapter(hints[key]))
        except ValidationError as error:
            reasons = dict.fromkeys(each["msg"] for each in error.errors())
            problems.append(f"{prefix}{key}: {value!r} does not fit ({' or '.join(reasons)})")
        except PydanticSchemaGenerationError:
            found[key] = value  # a type that pydantic does not know; the config checks it itself
    return found


_WORDS_OF_YAML = {False: ("no", "off"), True: ("yes", "on")}
"""What YAML reads as true or false where it is not quoted."""


def _converted(value: Any, kind: TypeAdapter[Any]) -> Any:
    """A value as its type has it. Raises pydantic's ValidationError."""
    try:
        return kind.validate_python(value)
    except ValidationError:
        for word in _WORDS_OF_YAML[value] if isinstance(value, bool) else ():
            with suppress(ValidationError):
                return kind.validate_python(word)
        raise


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
