"""Rate at which requests in flight end, and the time after which a refused client may retry. No torch."""

from __future__ import annotations

import math
from collections import deque
from time import monotonic

SOONEST, LATEST = 1.0, 600.0
"""Seconds after which a refused request may be sent again: at least, and at most."""
_NOTED = 64  # times at which something ended, of which the rate is that of the last


class EndRate:
    """Rate at which amounts (such as requests) end, over the seconds in which any was in flight: idle time does not
    count.

    One thread calls `note`; any thread may ask.
    """

    def __init__(self) -> None:
        self._ended: deque[tuple[float, int]] = deque(maxlen=_NOTED)  # so many, after so many seconds with work
        self._busy = 0.0  # seconds with work, since something ended
        self._since: float | None = None  # the last note, if it left work

    def note(self, n_ended: int, has_work: bool) -> None:
        """Note the amount that ended now. ``has_work``: more is in flight."""
        now = monotonic()
        self._busy += 0.0 if self._since is None else now - self._since
        self._since = now if has_work else None
        if n_ended:
            self._ended.append((self._busy, n_ended))
            self._busy = 0.0

    def seconds(self, n: int) -> float:
        """Return the seconds of work in which an amount ``n`` ends at the recent rate, from 1 to 600.

        If nothing has ended yet, it is the time of work so far.
        """
        noted, since = list(self._ended), self._since
        took = self._busy + (0.0 if since is None else monotonic() - since) + sum(seconds for seconds, _ in noted)
        n_ended = sum(n_ended for _, n_ended in noted)
        return math.ceil(min(max(took * n / n_ended if n_ended else took, SOONEST), LATEST))
