"""Messages of other threads to the engine. No torch."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from veneer.errors import VeneerError


@dataclass(frozen=True, slots=True)
class Abort:
    """End a request."""

    id: str


@dataclass(frozen=True, slots=True)
class Forget:
    """Drop an adapter's name; requests for it that are numbered up to ``up_to`` do not bring it back."""

    name: str
    up_to: int


@dataclass(frozen=True, slots=True, eq=False)
class Act:
    """Call a function between steps. ``told`` gets its result, or its VeneerError."""

    act: Callable[[], Any]
    told: Future[Any]

    def run(self) -> None:
        """Call it, unless nobody waits for it any more."""
        if self.told.set_running_or_notify_cancel():
            try:
                self.told.set_result(self.act())
            except VeneerError as error:
                self.told.set_exception(error)
