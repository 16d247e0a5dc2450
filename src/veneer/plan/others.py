"""Share of the CPU cores that other processes use."""

from __future__ import annotations

import os
import time
from typing import NamedTuple

import psutil

LEAST_SHARE = 0.05


class _Looked(NamedTuple):
    """Seconds at one moment: the clock's, the CPU time of all processes, and the CPU time of this process."""

    clock: float
    all: float
    own: float


class Others:
    """Use of the cores by other processes since this object was created."""

    def __init__(self) -> None:
        self._first = _looked()

    def free_share(self) -> float:
        """Return the share of all cores that others have left free since this object was made, at least
        `LEAST_SHARE`.
        """
        clock, used, own = (now - then for now, then in zip(_looked(), self._first, strict=True))
        cores = clock * (os.cpu_count() or 1)
        return min(1.0, max(LEAST_SHARE, 1.0 - (used - own) / cores)) if cores > 0 else 1.0


def _looked() -> _Looked:
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # which are in user and nice as well
    own = os.times()
    return _Looked(time.monotonic(), sum(times) - idle - guests, own.user + own.system)
