"""Times at which refused clients should return, spaced so that there is room for those who return. No torch."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

_TURNS = 4  # times as much as there is in flight: more is promised to nobody


class ReturnPlaces:
    """Queue of the refused clients: each is told to return after all earlier ones.

    If the queue is too long, it starts again from the front: the next client is told the first time. So clients that
    never return, or ask all the time, delay others for a bounded time. When the last client's time has come, the queue
    is empty. Call it from one thread.
    """

    def __init__(self) -> None:
        self._n = 0  # amounts that clients were told to return with
        self._due = 0.0  # time at which the last of them returns

    def seconds(self, n: int, in_flight: int, after: Callable[[int], float]) -> float:
        """Return the seconds after which a refused client should return. ``n`` is its amount, such as a number of
        tokens.

        ``in_flight`` is the amount in flight now. ``after(m)`` is the time in which there will be room for this client
        if an amount ``m`` comes before it.
        """
        now = monotonic()
        if now >= self._due or self._n >= _TURNS * in_flight:
            self._n = 0
        found = after(self._n)
        self._n += n
        self._due = max(self._due, now + found)
        return found
