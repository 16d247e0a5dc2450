"""Least-recently-used cache of a bounded number of values. No torch."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class LruCache(Generic[Key, Value]):
    """Values by key; the ``most`` that were used last are kept. Any thread may call it."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: dict[Key, Value] = {}  # the one that was used last at the end
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Key]:
        """Yield the keys, the one that was used last at the end."""
        with self._lock:
            return iter(list(self._values))

    def get(self, key: Key) -> Value | None:
        """Return the value of a key, which then counts as used last; None if there is none."""
        with self._lock:
            value = self._values.pop(key, None)
            if value is not None:
                self._values[key] = value
            return value

    def put(self, key: Key, value: Value) -> None:
        """Set the value of a key, which then counts as used last.

        If there are too many values, drop the one that has not been used for longest.
        """
        with self._lock:
            self._values.pop(key, None)
            self._values[key] = value
            if len(self._values) > self._most:
                self._drop_first()

    def drop_first(self) -> None:
        """Drop the value that has not been used for longest, if there is one."""
        with self._lock:
            if self._values:
                self._drop_first()

    def _drop_first(self) -> None:
        del self._values[next(iter(self._values))]
