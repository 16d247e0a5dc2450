"""Number of prompt rows that a step reads while answers are streamed, by the times of earlier steps. No torch."""

from __future__ import annotations

from collections import deque
from statistics import median

_STRETCH = 2.5  # how many times as long as decoding alone a step may take: three times is a gap that is noticed
_LEAST = 16  # rows of prompts that a step reads nevertheless
_EACH = 2  # and at least so many for each request: thrice as many rows take at most three times as long
_ALONE, _SEEN = 3, 7  # steps that decode alone, and those that read, whose median counts
_GROWN = 1.5  # times the rows for which it is known how long decoding takes, until that is seen again
_MIXED = 16  # steps with prompts one after the other, until one without shows again how long decoding takes


class PrefillBudget:
    """Measured times of steps, and the number of prompt rows that they allow the next step to read.

    A step that reads prompts delays the next token of every answer. If an answer is streamed, a step takes at most
    ``stretch`` times as long as a step that only decodes. Only `observe` changes the result, because the result is part
    of the scheduler's state.
    """

    def __init__(self, stretch: float = _STRETCH) -> None:
        self._stretch = stretch
        self._alone: deque[tuple[int, float]] = deque(maxlen=_ALONE)  # rows and seconds of steps that decode alone
        self._row: deque[float] = deque(maxlen=_SEEN)  # seconds of a row of a prompt
        self._n_mixed = 0

    def observe(self, n_decoding: int, n_read: int, seconds: float) -> None:
        """Record the seconds of a step that computed ``n_decoding`` rows of answers and ``n_read`` rows of prompts."""
        if n_decoding and not n_read:
            self._alone.append((n_decoding, seconds))
            self._n_mixed = 0
        elif n_read:
            alone = self._seconds_alone(n_decoding) if n_decoding and self._alone else 0.0
            self._row.append(max(seconds - alone, 0.1 * seconds) / n_read)
            self._n_mixed += n_decoding > 0

    @property
    def row_seconds(self) -> float | None:
        """Seconds to read a token of a prompt; None before the first was read."""
        return median(self._row) if self._row else None

    def rows(self, n_decoding: int, n_requests: int, most: int) -> int:
        """Return the number of prompt rows, at most ``most``, that a step may read beside ``n_decoding`` rows that
        decode.

        It is 0 if the time of a step that only decodes must be measured first. Otherwise it is at least twice
        ``n_requests``, the number of requests that would decode if all prompts were read. This lower bound does not
        depend on ``n_decoding``, because a shrinking batch would then read fewer and fewer prompt rows, and stay small.
        """
        if not self._alone or self._n_mixed >= _MIXED or n_decoding > _GROWN * self._alone[-1][0]:
            return 0
        least = min(max(_LEAST, _EACH * n_requests), most)
        if not self._row:
            return least
        seconds = (self._stretch - 1) * self._seconds_alone(n_decoding)
        return min(max(int(seconds / median(self._row)), least), most)

    def _seconds_alone(self, n: int) -> float:
        """Return a lower estimate of the seconds of a step that decodes n rows and reads no prompt.

        Times of earlier steps with more rows are scaled down to n; times of steps with fewer rows are taken as they
        are.

        Steps with far fewer rows are ignored if there are others: the end of one batch says little about the next.
        """
        like = [each for each in self._alone if n <= _GROWN * each[0]] or self._alone
        return median(seconds * min(1.0, n / n_seen) for n_seen, seconds in like)
