"""The game of a hidden number: a guess is answered by higher or lower."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

LAST = 64
N_GUESSES = 6


class Higher:
    """Environment of one game. Six guesses find any number from 1 to 63 if each halves the range."""

    def reset(self, number: int, **row: Any) -> None:
        """Begin a game for the hidden ``number``."""
        self._number, self._low, self._high = int(number), 1, LAST
        self._n_guesses, self._n_outside = 0, 0
        self.is_found = False

    def guess(self, number: int) -> str:
        """Guess the hidden number.

        Args:
            number: A number in the range.
        """
        if self.is_found or self._n_guesses == N_GUESSES:
            return "The game is over."
        if not isinstance(number, int):
            raise ValueError(f"{number} is no whole number: guess one from {self._low} to {self._high}")
        self._n_guesses += 1
        if not self._low <= number <= self._high:
            self._n_outside += 1
            return f"Outside. The number is from {self._low} to {self._high}."
        self.is_found = number == self._number
        if self.is_found:
            return "Found."
        if number < self._number:
            self._low = number + 1
        else:
            self._high = number - 1
        return f"{'Higher' if number < self._number else 'Lower'}. The number is from {self._low} to {self._high}."

    def get_reward(self) -> float:
        """Return 1 for a number that is found, else the share of its bits that are known, halved; 0.05 less for each
        guess outside the range.
        """
        known = math.log(LAST / (self._high - self._low + 1), LAST)
        return (1.0 if self.is_found else 0.5 * known) - 0.05 * self._n_outside


def found(completions: Sequence[Any], environments: Sequence[Higher], **row: Any) -> list[float]:
    """Return 1 for each game in which the number was found, else 0."""
    return [float(each.is_found) for each in environments]
