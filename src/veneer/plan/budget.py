"""Time that measurements of this machine may take."""

from __future__ import annotations

import time
from dataclasses import dataclass

from veneer.errors import UnmeasuredError

MOST_SECONDS = 20.0
"""After which a plan begins no further measurement. Some seconds are enough for one where the cores are free."""


@dataclass(slots=True)
class MeasuringTime:
    """Time in which measurements may begin: ``seconds``, counted from the first measurement. If it is 0, none may
    begin.
    """

    seconds: float = MOST_SECONDS
    _ends: float | None = None

    @property
    def is_open(self) -> bool:
        """Return True if a measurement may begin."""
        return self.seconds > 0 and (self._ends is None or time.monotonic() < self._ends)

    def begin(self) -> None:
        """Begin a measurement. Raises UnmeasuredError if there is no time left for it."""
        if not self.is_open:
            raise UnmeasuredError(
                f"this machine's speed is measured only in part, since measuring stops after {self.seconds:.0f} s: "
                "repeat the command to measure the rest"
                if self.seconds
                else "this machine's speed was not measured: run `veneer plan`, which measures it"
            )
        if self._ends is None:
            self._ends = time.monotonic() + self.seconds

    def interrupted(self) -> UnmeasuredError:
        """End the budget, and return the error to raise."""
        self._ends = time.monotonic()
        return UnmeasuredError("measuring this machine was interrupted: the same command goes on with it")
