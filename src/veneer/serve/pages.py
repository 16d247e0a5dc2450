"""Pages of keys and values, their holders, and the bytes that they share with adapters.

No torch: pages are numbers, and the runner has their memory.
"""

from __future__ import annotations

from collections.abc import Hashable

from veneer.errors import ConfigError


class Pages:
    """Pages and the page tables of their holders: ``n_pages`` of ``block`` positions and ``page_bytes`` bytes each.

    A page takes memory when it is first held, and keeps it for the next holder until others need the bytes. Bytes of
    ``n_bytes`` (None: the size of all pages) that pages do not take can be `lend` to others. Invariants:
    - A page is free or in exactly one table.
    - A table holds exactly as many pages as its positions need.
    - `grow` and `lend` fail only if pages or bytes are too few, and then change nothing.
    - Pages with memory and lent bytes take at most ``n_bytes``.
    - When all holders have released and all bytes are given back, every page is free.
    """

    def __init__(self, n_pages: int, block: int, *, page_bytes: int = 1, n_bytes: int | None = None) -> None:
        if n_pages < 1 or block < 1:
            raise ConfigError(f"{n_pages} pages of {block} positions: there must be at least one of each")
        self.n_pages, self.block, self.page_bytes = n_pages, block, page_bytes
        self.n_bytes = n_pages * page_bytes if n_bytes is None else n_bytes
        self.n_lent = 0
        self.shed: list[int] = []
        """Free pages whose memory others got: the runner is to give it back to the system."""
        self._fresh = list(range(n_pages - 1, -1, -1))  # free, without memory
        self._kept: list[int] = []  # free, with the memory that it had
        self._tables: dict[Hashable, list[int]] = {}

    @property
    def n_held(self) -> int:
        """Number of held pages."""
        return self.n_pages - len(self._kept) - len(self._fresh)

    @property
    def n_free(self) -> int:
        """Number of pages that can be held without bytes being given back."""
        return len(self._kept) + min(len(self._fresh), self._unused // self.page_bytes)

    @property
    def lendable(self) -> int:
        """Bytes that can be lent."""
        return self._unused + len(self._kept) * self.page_bytes

    def needed(self, n_positions: int) -> int:
        """Return the number of pages that ``n_positions`` need."""
        return -(-n_positions // self.block)

    def capacity(self, n_lent: int) -> int:
        """Return the number of positions that one holder can have while so many bytes are lent."""
        return min(self.n_pages, max(0, self.n_bytes - n_lent) // self.page_bytes) * self.block

    def covers(self, holder: Hashable, n_positions: int) -> bool:
        """Return True if a holder's table covers so many positions."""
        return len(self._tables.get(holder, ())) * self.block >= n_positions

    def lacking(self, holder: Hashable, n_positions: int) -> int | None:
        """Return the bytes that others must give back before `grow` succeeds; None if no bytes would help."""
        missing = self.needed(n_positions) - len(self._tables.get(holder, ()))
        if missing > len(self._kept) + len(self._fresh):
            return None
        return max(0, (missing - len(self._kept)) * self.page_bytes - self._unused)

    def grow(self, holder: Hashable, n_positions: int) -> bool:
        """Extend a holder's table to ``n_positions`` from the start.

        Returns False if pages are too few; nothing changes then.
        """
        table = self._tables.get(holder, [])
        missing = self.needed(n_positions) - len(table)
        if missing > self.n_free:
            return False
        table.extend((self._kept or self._fresh).pop() for _ in range(missing))
        if table:
            self._tables[holder] = table
        return True

    def table(self, holder: Hashable) -> tuple[int, ...]:
        """Return a holder's pages, in the order of its positions."""
        return tuple(self._tables.get(holder, ()))

    def release(self, holder: Hashable) -> None:
        """Free all of a holder's pages; the last in its table is the first to be reused."""
        self._kept.extend(self._tables.pop(holder, ()))

    def lend(self, n_bytes: int) -> bool:
        """Lend bytes to others, taking the memory of free pages if needed.

        Returns False if bytes are too few; nothing changes then.
        """
        if n_bytes > self.lendable:
            return False
        while n_bytes > self._unused:
            self.shed.append(self._kept.pop(0))
            self._fresh.append(self.shed[-1])
        self.n_lent += n_bytes
        return True

    def give_back(self, n_bytes: int) -> None:
        """Take lent bytes back."""
        self.n_lent -= n_bytes

    @property
    def _unused(self) -> int:
        """Bytes that neither pages nor others have."""
        return self.n_bytes - self.n_lent - (self.n_held + len(self._kept)) * self.page_bytes
