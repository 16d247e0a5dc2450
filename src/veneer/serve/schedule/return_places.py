"""Places of refused clients, so that no more of them return in a second than will find room. No torch."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

_TURNS = 4  # times as much as there is in flight: more is promised to nobody


class ReturnPlaces:
    """Queue of the clients that were told when to ask again. Each gets a place after the earlier ones.

    If there are too many places, the next client has the first one again: clients that never return, or ask all the
    time, keep others away for a bounded time. When the last one is due, the queue is empty. Call it from one thread.
    """

    def __init__(self) -> None:
        self._n = 0  # amounts that clients were told to return with
        self._due = 0.0  # time at which the last of them returns

    def seconds(self, n: int, in_flight: int, after: Callable[[int], float]) -> float:
        """Return the seconds after which a client returns with an amount.

        Args:
            n: Amount of the client.
            in_flight: Amount that is in flight now.
            after: Function of the amount that has its place before: the seconds in which there is room behind it.
        """
        now = monotonic()
        if now >= self._due or self._n >= _TURNS * in_flight:
            self._n = 0
        found = after(self._n)
        self._n += n
        self._due = max(self._due, now + found)
        return found
