"""Counts of adapters by name: requests, tokens, loads and evictions of a bounded number of names. No torch."""

from __future__ import annotations

from dataclasses import dataclass

MOST_NAMES = 200
OTHER = "other"


@dataclass(eq=False, slots=True)
class AdapterCount:
    """Counts of one adapter since its name was first used. ``load_seconds`` is the time that its loads took.

    ``n_hits`` counts the requests that found it loaded on arrival.
    """

    n_requests: int = 0
    n_hits: int = 0
    n_prompt: int = 0
    n_drawn: int = 0
    n_loads: int = 0
    load_seconds: float = 0.0
    n_evictions: int = 0


class AdapterCounts:
    """Counts of the first ``most`` names. Further names are counted together under `OTHER`.

    If a name is forgotten, the next new name gets counts of its own. A forgotten name that is used again starts at
    zero.
    """

    def __init__(self, most: int = MOST_NAMES) -> None:
        self._most = most
        self._counts = {OTHER: AdapterCount()}

    def of(self, name: str) -> AdapterCount:
        """Return the counts of a name; for a name beyond the first ``most``, return the common counts."""
        found = self._counts.get(name)
        if found is None and len(self._counts) > self._most:
            return self._counts[OTHER]
        if found is None:
            found = self._counts[name] = AdapterCount()
        return found

    def forget(self, name: str) -> None:
        """Drop the counts of a name, if it has its own."""
        if name != OTHER:
            self._counts.pop(name, None)

    def all(self) -> dict[str, AdapterCount]:
        """Return the counts by name. Any thread may call it."""
        return self._counts.copy()
