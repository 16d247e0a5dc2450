"""Reasons why pydantic refuses a value, in plain English."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_MUST_BE = {
    "a whole number": ("int_type", "int_parsing", "int_from_float"),
    "a whole number of fewer digits": ("int_parsing_size",),
    "a number": ("float_type", "float_parsing"),
    "a finite number": ("finite_number",),
    "true or false": ("bool_type", "bool_parsing"),
    "text": ("string_type", "string_sub_type", "invalid_key"),
    "a list": ("list_type", "tuple_type", "set_type", "iterable_type"),
    "an object (keys with values)": (
        "dict_type",
        "mapping_type",
        "model_type",
        "model_attributes_type",
        "dataclass_type",
    ),
    "{expected}": ("literal_error", "enum"),
    "null": ("none_required",),
    "at least {ge}": ("greater_than_equal",),
    "more than {gt}": ("greater_than",),
    "at most {le}": ("less_than_equal",),
    "less than {lt}": ("less_than",),
    "text of at least {min_length:,} characters": ("string_too_short",),
    "text of at most {max_length:,} characters": ("string_too_long",),
    "a list of at least {min_length:,} entries": ("too_short",),
    "a list of at most {max_length:,} entries": ("too_long",),
}
_BY_TYPE = {kind: words for words, kinds in _MUST_BE.items() for kind in kinds}
_IS = {"missing": "is missing", "extra_forbidden": "is unknown"}


def allowed(problems: Iterable[Mapping[str, Any]]) -> str:
    """Return ``"must be A or B"`` for pydantic's ``errors()`` about one value, one alternative for each type of a
    union.

    If this module has no words for one of the errors, pydantic's own messages are joined instead.
    """
    found = list(problems)
    if all(problem["type"] in _BY_TYPE for problem in found):
        return f"must be {' or '.join(dict.fromkeys(_filled(problem) for problem in found))}"
    return " or ".join(dict.fromkeys(_IS.get(problem["type"], problem["msg"]) for problem in found))


def unfit(value: Any, problems: Iterable[Mapping[str, Any]]) -> str:
    """Return ``"3 does not fit: it must be text"`` for pydantic's ``errors()`` about a value.

    If this module has no words for the errors, pydantic's own words follow in brackets.
    """
    reason = allowed(problems)
    return f"{value!r} does not fit{f': it {reason}' if reason.startswith(('must ', 'is ')) else f' ({reason})'}"


def by_place(value: Any, problems: Iterable[Mapping[str, Any]]) -> dict[tuple[Any, ...], list[Mapping[str, Any]]]:
    """Group pydantic's ``errors()`` about a value by the place within it, a tuple of keys and indices.

    Errors about the whole value are left out if there are errors about places within it. Then the value fits one type
    of a union except in these places.
    """
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for each in problems:
        found.setdefault(place_in(value, each["loc"]), []).append(each)
    return {place: of for place, of in found.items() if place} or found


def place_in(value: Any, loc: Iterable[Any]) -> tuple[Any, ...]:
    """Return the keys and indices of pydantic's ``loc`` that lead into a value; its other entries name types of a
    union.
    """
    found: list[Any] = []
    for part in loc:
        if part in value if isinstance(value, Mapping) else isinstance(value, list | tuple) and isinstance(part, int):
            value = value[part]
            found.append(part)
    return tuple(found)


def _filled(problem: Mapping[str, Any]) -> str:
    words = _BY_TYPE[problem["type"]].format(**problem.get("ctx", {}))
    return words.replace(" 1 characters", " 1 character").replace(" 1 entries", " 1 entry")
