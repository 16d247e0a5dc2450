"""Settings by module: keys are regular expressions, and the first that matches the end of a path counts, as in PEFT."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def first_match(pattern: Mapping[str, T], name: str, default: T) -> T:
    """The value of the first key that matches the end of a module path."""
    return next((value for key, value in pattern.items() if matches_end(key, name)), default)


def matches_end(key: str, name: str) -> bool:
    """Return True if a key matches a module path or its end, from a dot on."""
    return re.fullmatch(rf"(.*\.)?({key})", name) is not None


def compiles(pattern: str) -> bool:
    """Return True if a key is a regular expression."""
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True
