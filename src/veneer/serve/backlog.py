"""Limits of what waits: more is refused, with the time after which to ask again. No torch."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Sequence
from time import monotonic

from veneer.errors import ConfigError, QueueFullError
from veneer.serve.asked import Asked
from veneer.serve.scheduler import Limits
from veneer.serve.waiting import Waiting

_SOONEST, _LATEST = 1.0, 600.0  # seconds after which to ask again
_STEPS = 64  # of which the rate of admissions is that of the last


class Backlog:
    """Requests that wait: in the scheduler's queues, or submitted and on their way there. Any thread may call it."""

    def __init__(self, limits: Limits, waiting: Waiting) -> None:
        self._limits, self._waiting = limits, waiting
        self._n, self._n_tokens = 0, 0  # on their way
        self._lock = threading.RLock()
        self.n_refused = 0
        """Number of refusals since the start."""
        self._admitted: deque[tuple[float, int]] = deque(maxlen=_STEPS)  # times of steps, and how many they admitted

    def require_possible(self, n: int, n_prompt: int) -> None:
        """Raise ConfigError for answers to one prompt that are too many to wait at any time."""
        most, most_tokens = self._limits.max_waiting, self._limits.max_waiting_tokens
        if n > most or n * n_prompt > most_tokens:
            raise ConfigError(
                f"n={n} answers to a prompt of {n_prompt} tokens are asked for, and at most {most} answers and "
                f"{most_tokens} tokens can wait: ask for fewer, or raise max_waiting_requests or max_waiting_tokens"
            )

    def has_room(self, asked: Sequence[Asked]) -> bool:
        """Return True if these could be submitted now."""
        n, n_tokens = _size(asked)
        fits = self._n + len(self._waiting) + n <= self._limits.max_waiting
        return fits and self._n_tokens + self._waiting.n_tokens + n_tokens <= self._limits.max_waiting_tokens

    def require_room(self, asked: Sequence[Asked]) -> None:
        """Raise QueueFullError if these could not be submitted now."""
        if not self.has_room(asked):
            seconds = self._seconds(_size(asked)[0])
            raise QueueFullError(
                f"{self._n + len(self._waiting)} requests with {self._n_tokens + self._waiting.n_tokens} tokens wait, "
                f"and at most {self._limits.max_waiting} with {self._limits.max_waiting_tokens} may: ask again in "
                f"{seconds:.0f} s",
                seconds,
            )

    def submit(self, asked: Asked) -> None:
        """Count a request that is on its way. Raises QueueFullError."""
        with self._lock:
            self.require_room([asked])
            self._count(asked, 1)

    def arrive(self, asked: Asked) -> None:
        """Remove a request that has arrived in the scheduler's queues."""
        with self._lock:
            self._count(asked, -1)

    def admitted(self, n: int) -> None:
        """Note how many requests a step has admitted."""
        if n:
            self._admitted.append((monotonic(), n))

    def _count(self, asked: Asked, sign: int) -> None:
        n, n_tokens = _size([asked])
        self._n, self._n_tokens = self._n + sign * n, self._n_tokens + sign * n_tokens

    def _seconds(self, n: int) -> float:
        """The time in which as many were admitted lately."""
        noted = list(self._admitted)
        total = sum(n_admitted for _, n_admitted in noted[1:])
        took = noted[-1][0] - noted[0][0] if total else 0.0
        return math.ceil(min(max(took * n / max(total, 1), _SOONEST), _LATEST))


def _size(asked: Sequence[Asked]) -> tuple[int, int]:
    """The number of answers, and that of the tokens of their prompts."""
    return sum(each.params.n for each in asked), sum(each.params.n * len(each.prompt_ids) for each in asked)
