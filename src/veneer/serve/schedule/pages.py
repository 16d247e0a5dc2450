"""Pages of keys and values, the requests that hold them, and the memory budget that pages share with adapters.

No torch: pages are numbers, and the runner has their memory.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

from veneer.errors import ConfigError
from veneer.serve.schedule.eviction import Eviction
from veneer.serve.schedule.prefix_cache import PrefixCache, Tail


class Owner(NamedTuple):
    """Adapter version that acted on the pages of a sequence from page number ``first`` on.

    On earlier pages only the base acted.
    """

    version: str | None = None
    first: int = 0

    def of(self, page: int) -> str | None:
        """Return the version that acted on a page, given by its number in the sequence; None for the base."""
        return self.version if page >= self.first else None


BASE = Owner()


class Pages:
    """Allocator of ``n_pages`` pages of ``block`` positions and ``page_bytes`` bytes, with a page table for each
    holder.

    If pages are not ``rewritable``, they keep a state after their last position, and no position is written twice: a
    partly filled page is taken over whole or not at all.

    A holder is a sequence. It has ``n_fixed`` pages besides those of its positions. A page takes memory when it is
    first held. It keeps that memory when it is free, until the bytes are needed elsewhere. Bytes of ``n_bytes`` that
    pages do not take can be lent to others, such as adapters (`lend`). If ``n_bytes`` is None, it is the size of all
    pages. A full page that is published under a key may be in several tables. It is cached while it is in none; at most
    ``most_cached`` pages are, and all may be if it is None. Invariants:

    - A page is free, cached, or in tables; it is in more than one only if it is published.
    - A table holds exactly the pages that its positions need, the fixed ones, and those of a draft while it is tried.
    - A holder of a published page holds all pages before it in the sequence, under their keys.
    - `grow` and `lend` fail only if pages or bytes are too few, and then change nothing.
    - Pages with memory and lent bytes take at most ``n_bytes``.
    - When all holders have released, all bytes are given back and the cache is reset, every page is free.
    """

    def __init__(
        self,
        n_pages: int,
        block: int,
        *,
        page_bytes: int = 1,
        n_bytes: int | None = None,
        worth: Eviction | None = None,
        most_cached: int | None = None,
        n_fixed: int = 0,
        rewritable: bool = True,
    ) -> None:
        if n_pages < 1 or block < 1:
            raise ConfigError(f"{n_pages} pages of {block} positions: there must be at least one of each")
        self.n_pages, self.block, self.page_bytes, self.n_fixed = n_pages, block, page_bytes, n_fixed
        self.rewritable = rewritable
        self.n_bytes = n_pages * page_bytes if n_bytes is None else n_bytes
        self.n_lent = 0
        self.shed: list[int] = []
        """Free pages whose bytes were lent to others: the runner must free their memory."""
        self.left: list[Hashable] = []
        """Holders that have released their pages: the runner must free all other memory that it keeps for them."""
        self._fresh = list(range(n_pages - 1, -1, -1))  # free, without memory
        self._kept: list[int] = []  # free, with the memory that it had
        self._tables: dict[Hashable, list[int]] = {}
        self._told: dict[Hashable, tuple[int, ...]] = {}  # tables that have not changed since they were asked for
        self._n_tables: dict[int, int] = {}  # of each page that is in one
        self._outdated = set[Hashable]()  # holders of pages from before the last reset
        self.worth, self._most_cached = worth or Eviction(), n_pages if most_cached is None else most_cached
        self._cache = PrefixCache(self.worth, block, page_bytes, whole_tails=not rewritable)

    @property
    def n_held(self) -> int:
        """Number of held pages."""
        return len(self._n_tables)

    @property
    def n_cached(self) -> int:
        """Number of pages that no sequence holds and that can be found by their keys."""
        return self._cache.n_idle

    @property
    def n_free(self) -> int:
        """Number of pages that can be held now, while lent bytes stay lent."""
        return len(self._kept) + min(len(self._fresh), self._unused // self.page_bytes)

    @property
    def free_bytes(self) -> int:
        """Bytes that can be lent without evicting a cached page."""
        return self._unused + len(self._kept) * self.page_bytes

    @property
    def lendable(self) -> int:
        """Bytes that can be lent if all cached pages are evicted."""
        return self.free_bytes + self.n_cached * self.page_bytes

    @property
    def least(self) -> float | None:
        """Value of the cached page that is evicted next; None if no page is cached."""
        return self._cache.least()

    @property
    def lacks_bytes(self) -> bool:
        """Return True if lent bytes, once given back, would make more pages free."""
        return len(self._fresh) * self.page_bytes > self._unused

    def needed(self, n_positions: int) -> int:
        """Return the number of pages that ``n_positions`` need."""
        return -(-n_positions // self.block) + self.n_fixed if n_positions else 0

    def capacity(self, n_lent: int) -> int:
        """Return the number of positions that one holder can have while ``n_lent`` bytes are lent."""
        n_pages = min(self.n_pages, max(0, self.n_bytes - n_lent) // self.page_bytes)
        return max(0, n_pages - self.n_fixed) * self.block

    def covers(self, holder: Hashable, n_positions: int) -> bool:
        """Return True if a holder's table covers ``n_positions`` positions."""
        return len(self._tables.get(holder, ())) >= self.needed(n_positions)

    def lacking(self, holder: Hashable, n_positions: int, keys: Sequence[bytes] = ()) -> int | None:
        """Return the bytes that must be given back before `grow` succeeds; None if it fails even then.

        ``keys`` are those of the blocks that the holder will `share` first.
        """
        shared = sum(page in self._n_tables for page in self._cache.found(keys))  # cached ones are counted below
        missing = self.needed(n_positions) - len(self._tables.get(holder, ())) - shared
        with_memory = len(self._kept) + self.n_cached
        if missing > with_memory + len(self._fresh):
            return None
        return max(0, (missing - with_memory) * self.page_bytes - self._unused)

    def has_free(self, holder: Hashable, n_positions: int) -> bool:
        """Return True if `grow` succeeds without evicting a cached page."""
        return self.needed(n_positions) - len(self._tables.get(holder, ())) <= self.n_free

    def grow(self, holder: Hashable, n_positions: int) -> bool:
        """Extend a holder's table to its first ``n_positions`` positions. If no page is free, cached pages are evicted.

        Returns False if pages are too few; nothing changes then.
        """
        table = self._tables.get(holder, [])
        missing = self.needed(n_positions) - len(table)
        if missing > self.n_free + self.n_cached:
            return False
        for _ in range(missing):
            table.append(self._free_page())
            self._n_tables[table[-1]] = 1
        if missing:
            self._change(holder)
        if table:
            self._tables[holder] = table
        return True

    def shrink(self, holder: Hashable, n_positions: int) -> None:
        """Take the pages after ``n_positions`` positions from a holder; these pages are not published."""
        table = self._tables.get(holder, [])
        for page in reversed(table[self.needed(n_positions) :]):
            table.pop()
            self._leave(page)
            self._change(holder)

    def table(self, holder: Hashable) -> tuple[int, ...]:
        """Return a holder's pages, in the order of its positions; the same tuple until they change."""
        if holder not in self._told and holder in self._tables:
            self._told[holder] = tuple(self._tables[holder])
        return self._told.get(holder, ())

    def n_found(self, keys: Sequence[bytes]) -> int:
        """Return the number of first keys, up to the first unknown one, whose pages can be shared."""
        return len(self._cache.found(keys))

    def share(self, holder: Hashable, keys: Sequence[bytes]) -> int:
        """Begin a holder's table with the pages of the first keys, up to the first unknown key. Return the number of
        pages.
        """
        pages = self._cache.found(keys)
        if pages:
            self._change(holder)
            self._tables[holder] = pages
        for page in pages:
            self._enter(page)
        return len(pages)

    def count_use(self, holder: Hashable) -> None:
        """Count one more use of each published page that a holder has."""
        self._cache.use([page for page in self._tables.get(holder, ()) if page in self._cache])

    def publish(self, holder: Hashable, keys: Sequence[bytes], first: int, owner: Owner = BASE) -> None:
        """Publish a holder's full pages from number ``first`` on. ``keys`` are those of all its full pages.

        ``owner`` says which pages an adapter version acted on. If another page is already published under a key, the
        holder gets that page, and its own is freed. A holder that began before a `reset` publishes nothing.
        """
        table = self._tables.get(holder, [])
        for i in range(first, 0 if holder in self._outdated else len(keys)):
            page = self._cache.page(keys[i])
            if page is None:
                self._cache.add(keys[i], table[i], keys[i - 1] if i else None, owner.of(i))
            elif page != table[i]:
                self._leave(table[i])
                self._enter(page)
                self._change(holder)
                table[i] = page

    def reset(self) -> None:
        """Forget all keys: no page that was computed so far is found again."""
        self._kept.extend(self._cache.clear())
        self._outdated.update(self._tables)

    def forget(self, version: str) -> None:
        """Free the cached pages of an adapter version that is gone."""
        self._kept.extend(self._cache.forget(version))

    def evict(self) -> None:
        """Evict the least valuable cached page, which is then free."""
        self._kept.append(self._cache.evict())

    def take_tail(self, holder: Hashable, wanted: Tail) -> int:
        """Give a holder the cached, partly filled page that continues its sequence. The holder may write to it.

        Returns the number of its leading positions that equal those of ``wanted``; 0 if there is no such page.
        """
        found = self._cache.take_tail(wanted)
        if found is None:
            return 0
        page, n = found
        self._tables.setdefault(holder, []).append(page)
        self._n_tables[page] = 1
        self._change(holder)
        return n

    def release(self, holder: Hashable, tail: Tail | None = None, owner: Owner = BASE) -> None:
        """Release a holder's pages. Published pages and the partly filled ``tail`` stay cached; other pages are free.

        If the page before the tail is not published, or the holder began before a `reset`, the tail is not cached.
        """
        self._change(holder)
        self.left.append(holder)
        table = self._tables.pop(holder, [])
        follows = tail is not None and (not tail.n_full or self._cache.page(tail.parent) == table[tail.n_full - 1])
        if tail is not None and follows and holder not in self._outdated:
            page = table.pop(tail.n_full)
            del self._n_tables[page]
            replaced = self._cache.keep_tail(tail, page, owner.of(tail.n_full))
            self._kept += [] if replaced is None else [replaced]
        self._outdated.discard(holder)
        for page in reversed(table):
            self._leave(page)
        while self.n_cached > self._most_cached:
            self.evict()

    def lend(self, n_bytes: int) -> bool:
        """Lend bytes to others. If needed, they come from free pages that have memory, and then from cached pages.

        Returns False if bytes are too few; nothing changes then.
        """
        if n_bytes > self.lendable:
            return False
        while n_bytes > self._unused:
            if not self._kept:
                self.evict()
            self.shed.append(self._kept.pop(0))
            self._fresh.append(self.shed[-1])
        self.n_lent += n_bytes
        return True

    def give_back(self, n_bytes: int) -> None:
        """Take lent bytes back."""
        self.n_lent -= n_bytes

    @property
    def _unused(self) -> int:
        """Return the bytes of the budget that are neither in pages nor lent to adapters."""
        return self.n_bytes - self.n_lent - (self.n_held + self.n_cached + len(self._kept)) * self.page_bytes

    def _free_page(self) -> int:
        if not self.n_free:
            self.evict()
        return (self._kept or self._fresh).pop()

    def _change(self, holder: Hashable) -> None:
        self._told.pop(holder, None)

    def _enter(self, page: int) -> None:
        """Count one more page table that uses a published page."""
        self._n_tables[page] = self._n_tables.get(page, 0) + 1
        if self._n_tables[page] == 1:
            self._cache.hold(page)

    def _leave(self, page: int) -> None:
        """Count one page table less that uses a page. After the last, a cached page may be evicted, and any other page
        is free.
        """
        self._n_tables[page] -= 1
        if self._n_tables[page]:
            return
        del self._n_tables[page]
        if page in self._cache:
            self._cache.idle(page)
        else:
            self._kept.append(page)
