"""Settings by module. Keys are regular expressions; the first that matches the end of a path counts, as in PEFT."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from veneer.contract.checks import Checks
from veneer.records.sites import LinearSite

T = TypeVar("T")


@dataclass(frozen=True)
class PatternChecks(Checks):
    """Checks that refuse every key of ``patterns`` that matches no module. ``patterns`` holds the patterns by field
    name.
    """

    patterns: Mapping[str, Mapping[str, Any]]

    def effect(self, names: Sequence[str], sites: Sequence[LinearSite]) -> list[str]:
        return unmatched(self.patterns, names)


def values_of(config: object, field: str, pattern: str) -> dict[str, Any]:
    """Return the value of a field and all values of its pattern field, each under the name that messages use."""
    by_key = {f"{pattern}[{key!r}]": value for key, value in getattr(config, pattern).items()}
    return {field: getattr(config, field), **by_key}


def below_one(values: Mapping[str, int]) -> list[str]:
    """Return a problem for each value that is not an integer of at least 1."""
    return [f"{name}={value!r} must be a whole number of at least 1" for name, value in values.items() if value < 1]


def first_match(pattern: Mapping[str, T], name: str, default: T) -> T:
    """Return the value of the first key that matches the end of a module path."""
    return next((value for key, value in pattern.items() if matches_end(key, name)), default)


def matches_end(key: str, name: str) -> bool:
    """Return True if a key matches a whole module path, or its end after a dot."""
    return re.fullmatch(rf"(.*\.)?({key})", name) is not None


def unmatched(patterns: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """Return a sentence for each key that matches none of the adapted modules, whose paths are ``names``."""
    return [
        f"{field} key {key!r} matches none of the {len(names)} modules adapted, such as {names[0]!r}"
        for field, pattern in patterns.items()
        for key in pattern
        if not any(matches_end(key, name) for name in names)
    ]


def broken(patterns: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a sentence for each key that is not a regular expression."""
    keys = (key for pattern in patterns.values() for key in pattern)
    return [f"the pattern {key!r} is not a regular expression" for key in keys if not compiles(key)]


def compiles(pattern: str) -> bool:
    """Return True if a key is a regular expression."""
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True
