"""Amounts in flight, and the time in which some of them will have ended. No torch."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from time import monotonic

from veneer.serve.schedule.end_rate import LATEST, SOONEST

_NOTED = 64  # durations of the last that ended
_LONGER = 1.5  # a request that lasts longer than all of these is thought to last so many times as long as it has


class InFlight:
    """Amounts in flight. Each is thought to last as long as those of the last that lasted longer than it has so far.

    Call it from one thread.
    """

    def __init__(self) -> None:
        self.n = 0
        """Sum of the amounts in flight."""
        self._began: dict[object, tuple[float, int]] = {}
        self._lasted: deque[float] = deque(maxlen=_NOTED)

    @contextmanager
    def counted(self, n: int) -> Iterator[None]:
        """Count an amount within a block."""
        ticket, began = object(), monotonic()
        self._began[ticket] = began, n
        self.n += n
        try:
            yield
        finally:
            del self._began[ticket]
            self.n -= n
            self._lasted.append(monotonic() - began)

    def seconds(self, n: int) -> int:
        """Return the seconds in which ``n`` of the amounts in flight will have ended, 1 to 600."""
        now = monotonic()
        ends = sorted((self._remaining(now - began), amount) for began, amount in self._began.values())
        enough = [
            after for (after, _), ended in zip(ends, accumulate(each for _, each in ends), strict=True) if ended >= n
        ]
        after = enough[0] if enough else ends[-1][0] if ends else 0.0
        return math.ceil(min(max(after, SOONEST), LATEST))

    def _remaining(self, age: float) -> float:
        longer = [lasted for lasted in self._lasted if lasted > age]
        return (statistics.median(longer) if longer else _LONGER * age) - age
