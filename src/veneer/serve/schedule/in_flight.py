"""Amounts in flight, and the time after which some of them will have ended. No torch."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from time import monotonic

from veneer.serve.schedule.end_rate import LATEST, SOONEST
from veneer.serve.schedule.return_places import ReturnPlaces

_NOTED = 64  # durations of the last that ended
_LONGER = 1.5  # a request that lasts longer than all of these is thought to last so many times as long as it has


class InFlight:
    """Amounts in flight, such as tokens, and estimates of when they end.

    The estimate of an amount's duration comes from recent amounts that lasted longer than it has lasted so far. Call it
    from one thread.
    """

    def __init__(self) -> None:
        self.n = 0
        """Sum of the amounts in flight."""
        self._began: dict[object, tuple[float, int]] = {}
        self._lasted: deque[float] = deque(maxlen=_NOTED)
        self._places = ReturnPlaces()

    @contextmanager
    def counted(self, n: int) -> Iterator[None]:
        """Count an amount as in flight while the context is open."""
        ticket, began = object(), monotonic()
        self._began[ticket] = began, n
        self.n += n
        try:
            yield
        finally:
            del self._began[ticket]
            self.n -= n
            self._lasted.append(monotonic() - began)

    def refused(self, n: int, most: int) -> int:
        """Return the seconds, 1 to 600, after which a client may retry if its amount ``n`` does not fit within ``most``
        now.

        The time includes the turns of clients that were refused earlier, since they retry first.
        """
        over = self.n + n - most
        return math.ceil(self._places.seconds(n, self.n, lambda ahead: self.seconds(over + ahead)))

    def seconds(self, n: int) -> int:
        """Return the seconds, 1 to 600, after which an amount ``n`` of what is in flight will have ended.

        If less than ``n`` is in flight, the same amounts are assumed to follow and to take as long.
        """
        now = monotonic()
        ends = sorted((self._remaining(now - began), amount) for began, amount in self._began.values())
        turns, rest = divmod(n - 1, max(self.n, 1))
        ended = accumulate(amount for _, amount in ends)
        first = next((after for (after, _), so_many in zip(ends, ended, strict=True) if so_many > rest), 0.0)
        turn = max(ends[-1][0], SOONEST) if ends else 0.0
        return math.ceil(min(max(turns * turn + first, SOONEST), LATEST))

    def _remaining(self, age: float) -> float:
        longer = [lasted for lasted in self._lasted if lasted > age]
        return (statistics.median(longer) if longer else _LONGER * age) - age
