"""Names of modules by their paths: which ones a pattern matches, and which ones resemble it."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from veneer.plain.nearest import nearest


def matches_any(name: str, patterns: Collection[str] | str) -> bool:
    """Return True if a module path matches a regular expression (a string, matched whole), or a name or suffix."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def nearest_modules(pattern: str, paths: Sequence[str]) -> list[str]:
    """Return modules' last names that resemble the last name of the pattern.

    If a module has exactly this last name, return whole paths instead: those with this last name that resemble the
    pattern.
    """
    last = pattern.rpartition(".")[2]
    same = [path for path in paths if path.rpartition(".")[2] == last]
    return (nearest(pattern, same) or same[:1]) if same else nearest(last, (p.rpartition(".")[2] for p in paths))
