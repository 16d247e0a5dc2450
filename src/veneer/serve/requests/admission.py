"""Limits on waiting requests: one more is refused, with the time after which to retry. No torch."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

from veneer.errors import ConfigError, QueueFullError
from veneer.serve.requests.checked import CheckedRequest
from veneer.serve.schedule.end_rate import EndRate
from veneer.serve.schedule.queues import Queues
from veneer.serve.schedule.return_places import ReturnPlaces
from veneer.serve.schedule.scheduler import Limits


class Admission:
    """Waiting requests: those in the scheduler's queues, and those that were submitted but have not reached the queues
    yet.

    Any thread may call it.
    """

    def __init__(self, limits: Limits, waiting: Queues) -> None:
        self._limits, self._waiting = limits, waiting
        self._n, self._n_tokens = 0, 0  # on their way
        self._lock = threading.RLock()
        self._places = ReturnPlaces()
        self.n_refused = 0
        """Number of refusals since the start."""
        self.rate = EndRate()
        """Rate at which answers end; the engine notes them after each step."""

    def require_possible(self, n: int, n_prompt: int) -> None:
        """Raise ConfigError if n answers to a prompt of ``n_prompt`` tokens exceed the limits of the whole queue."""
        most, most_tokens = self._limits.max_waiting, self._limits.max_waiting_tokens
        if n > most or n * n_prompt > most_tokens:
            raise ConfigError(
                f"n={n} answers to a prompt of {n_prompt} tokens are asked for, and at most {most} answers and "
                f"{most_tokens} tokens can wait: ask for fewer, or raise max_waiting_requests or max_waiting_tokens"
            )

    def has_room(self, asked: Sequence[CheckedRequest]) -> bool:
        """Return True if these requests could be submitted now."""
        n, n_tokens = _size(asked)
        fits = self._n + len(self._waiting) + n <= self._limits.max_waiting
        return fits and self._n_tokens + self._waiting.n_tokens + n_tokens <= self._limits.max_waiting_tokens

    def require_room(self, asked: Sequence[CheckedRequest]) -> None:
        """Raise QueueFullError if these requests could not be submitted now."""
        if not self.has_room(asked):
            n, n_tokens = self._n + len(self._waiting), self._n_tokens + self._waiting.n_tokens
            self.note_refusal()
            seconds = self._return_seconds(asked, n)
            raise QueueFullError(
                f"{n} requests with {n_tokens} tokens wait, and at most {self._limits.max_waiting} with "
                f"{self._limits.max_waiting_tokens} may: ask again in {seconds:.0f} s",
                seconds,
            )

    def note_refusal(self) -> None:
        """Count one more refused request, also if another part of the server refused it."""
        with self._lock:
            self.n_refused += 1

    def submit(self, asked: CheckedRequest) -> None:
        """Count a request that was submitted and has not reached the scheduler's queues yet.

        Raises QueueFullError if there is no room for it.
        """
        with self._lock:
            self.require_room([asked])
            self._count(asked, 1)

    def arrive(self, asked: CheckedRequest) -> None:
        """Stop counting a request as submitted, because it has reached the scheduler's queues."""
        with self._lock:
            self._count(asked, -1)

    def _count(self, asked: CheckedRequest, sign: int) -> None:
        n, n_tokens = _size([asked])
        self._n, self._n_tokens = self._n + sign * n, self._n_tokens + sign * n_tokens

    def _return_seconds(self, asked: Sequence[CheckedRequest], n_waiting: int) -> float:
        """Estimate the seconds until refused requests will have room. Requests refused earlier are expected to return
        first.
        """
        over = self._n_over(asked)
        with self._lock:
            return self._places.seconds(_size(asked)[0], n_waiting, lambda ahead: self.rate.seconds(over + ahead))

    def _n_over(self, asked: Sequence[CheckedRequest]) -> int:
        """Return how many answers must end before there is room for ``asked``, if each answer has the mean number of
        tokens.
        """
        n, n_tokens = _size(asked)
        n_there, n_tokens_there = self._n + len(self._waiting), self._n_tokens + self._waiting.n_tokens
        over = n_there + n - self._limits.max_waiting
        over_tokens = n_tokens_there + n_tokens - self._limits.max_waiting_tokens
        return max(over, math.ceil(over_tokens * n_there / max(n_tokens_there, 1)))


def _size(asked: Sequence[CheckedRequest]) -> tuple[int, int]:
    """Return the number of answers, and the number of tokens in their prompts."""
    return sum(each.params.n for each in asked), sum(each.params.n * len(each.prompt_ids) for each in asked)
