"""Group of sized entries, with the sum of their bytes at hand. No torch."""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """Entry whose bytes do not change while it is in a group."""

    n_bytes: int


Entry = TypeVar("Entry", bound=Sized)


class SizedGroup(Generic[Entry]):
    """Entries by id, in the order in which they came."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.n_bytes = 0

    def __len__(self) -> int:
        return len(self.entries)

    def set(self, id: str, entry: Entry, there: bool) -> None:
        """Make an entry the last one if ``there`` and it is absent; if not ``there``, remove it if it is present."""
        if there and id not in self.entries:
            self.entries[id] = entry
            self.n_bytes += entry.n_bytes
        elif not there and self.entries.pop(id, None) is not None:
            self.n_bytes -= entry.n_bytes
