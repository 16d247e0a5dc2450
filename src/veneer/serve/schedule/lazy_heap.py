"""Heap whose items' keys may change: a key is computed again only when its item comes first. No torch."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
_SLACK = 16  # outdated entries that are not worth a rebuild


class LazyHeap(Generic[Item]):
    """Items of which the one with the least ``key`` is found in O(log n). No two items have equal keys.

    A key may grow, or become None (the item is no longer here), without notice. An item whose key becomes less, or that
    comes back, is `put` again. A heap takes memory for at most twice its items.
    """

    def __init__(self, key: Callable[[Item], Any]) -> None:
        self._key = key
        self._heap: list[tuple[Any, int, Item]] = []
        self._stored: dict[Item, Any] = {}  # the key that counts of all under which an item is in the heap
        self._ties = itertools.count()

    def put(self, item: Item) -> None:
        """Add an item, or note that its key has become less."""
        key, stored = self._key(item), self._stored.get(item)
        if key is not None and (stored is None or key < stored):
            self._push(key, item)

    def discard(self, item: Item) -> None:
        """Remove an item, if it is here."""
        if self._stored.pop(item, None) is not None:
            self._shrink()

    def first(self) -> Item | None:
        """Return the item with the least key; None if there is none."""
        while self._heap:
            stored, _, item = self._heap[0]
            counts = item in self._stored and self._stored[item] == stored
            key = self._key(item) if counts else None
            if counts and key == stored:
                return item
            heapq.heappop(self._heap)
            if counts and key is None:
                del self._stored[item]
            elif counts:
                self._push(key, item)
        return None

    def _push(self, key: Any, item: Item) -> None:
        self._stored[item] = key
        heapq.heappush(self._heap, (key, next(self._ties), item))
        self._shrink()

    def _shrink(self) -> None:
        if len(self._heap) > 2 * len(self._stored) + _SLACK:
            self._heap = [entry for entry in self._heap if self._stored.get(entry[2]) == entry[0]]
            heapq.heapify(self._heap)
