"""Known names that resemble an unknown one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """Return at most ``n`` of the known names: those that look most like ``name``, which was not found."""
    names = sorted(set(known))
    near = difflib.get_close_matches(name, names, n=n, cutoff=0.4)
    swapped = [each for each in names if _is_swapped(name, each)]
    near = [*swapped, *(each for each in near if each not in swapped)][:n]
    meant = f"{name[:1]}_proj"  # "query" shares little with "q_proj"
    if name in ("query", "key", "value", "output") and meant in names:
        near = [meant, *(each for each in near if each != meant)][:n]
    return near


def _is_swapped(name: str, other: str) -> bool:
    """Return True if the names differ by one swap of neighbouring letters, which is one slip of the fingers."""
    wrong = [at for at, (a, b) in enumerate(zip(name, other, strict=False)) if a != b]
    if len(name) != len(other) or len(wrong) != 2 or wrong[1] != wrong[0] + 1:
        return False
    first, second = wrong
    return name[first] == other[second] and name[second] == other[first]
