"""Names nearest to one that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """Return the known names that look most like one that was not found."""
    names = sorted(set(known))
    near = difflib.get_close_matches(name, names, n=n, cutoff=0.4)
    meant = f"{name[:1]}_proj"  # "query" shares little with "q_proj"
    if name in ("query", "key", "value", "output") and meant in names:
        near = [meant, *(each for each in near if each != meant)][:n]
    return near
