"""The pages of keys and values, and who holds them. No torch: pages are numbers, their bytes lie with the runner."""

from __future__ import annotations

from collections.abc import Hashable

from veneer.errors import ConfigError


class Pages:
    """``n_pages`` pages of ``block`` positions each, and the page tables of their holders.

    Laws: a page is free or in exactly one table; a table holds just as many pages as its positions need; `grow` fails
    only where free pages lack, and then changes nothing; when all holders have released, every page is free.
    """

    def __init__(self, n_pages: int, block: int) -> None:
        if n_pages < 1 or block < 1:
            raise ConfigError(f"{n_pages} pages of {block} positions: there must be at least one of each")
        self.n_pages, self.block = n_pages, block
        self._free = list(range(n_pages - 1, -1, -1))
        self._tables: dict[Hashable, list[int]] = {}

    @property
    def n_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def needed(self, n_positions: int) -> int:
        """Pages for that many positions."""
        return -(-n_positions // self.block)

    def grow(self, holder: Hashable, n_positions: int) -> bool:
        """Let a holder's table cover ``n_positions`` from the start; False where pages lack, and nothing changes."""
        table = self._tables.get(holder, [])
        missing = self.needed(n_positions) - len(table)
        if missing > len(self._free):
            return False
        table.extend(self._free.pop() for _ in range(missing))
        if table:
            self._tables[holder] = table
        return True

    def table(self, holder: Hashable) -> tuple[int, ...]:
        """A holder's pages, in the order of its positions."""
        return tuple(self._tables.get(holder, ()))

    def release(self, holder: Hashable) -> None:
        """Give all of a holder's pages back; the last that it took is the first to be taken again."""
        self._free.extend(self._tables.pop(holder, ()))
