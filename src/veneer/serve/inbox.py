"""Messages of other threads to the engine, kept in order until its next step. No torch."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from veneer.errors import VeneerError

Message = TypeVar("Message")


class Inbox(Generic[Message]):
    """Queue of messages from any thread to the one thread that takes them."""

    def __init__(self) -> None:
        self._messages: deque[Message] = deque()
        self._filled = threading.Event()

    def put(self, message: Message) -> None:
        """Add a message; never blocks."""
        self._messages.append(message)
        self._filled.set()

    def take(self) -> Message | None:
        """Remove and return the oldest message; None if there is none. Never blocks."""
        try:
            return self._messages.popleft()
        except IndexError:
            self._filled.clear()
            if self._messages:  # one came meanwhile
                self._filled.set()
            return None

    def wait(self, seconds: float | None = None) -> bool:
        """Block until there is a message, for at most ``seconds``; return False if none came."""
        return self._filled.wait(seconds)


@dataclass(frozen=True, slots=True)
class Abort:
    """Message to end the request ``id``."""

    id: str


@dataclass(frozen=True, slots=True)
class Forget:
    """Message to drop an adapter's name. Requests for it that are numbered up to ``up_to`` do not register the name
    again.
    """

    name: str
    up_to: int


@dataclass(frozen=True, slots=True, eq=False)
class Act:
    """Message to call a function between steps. ``told`` receives its result, or its error if that is a VeneerError."""

    act: Callable[[], Any]
    told: Future[Any]

    def run(self) -> None:
        """Call the function, unless nobody waits for its result any more."""
        if self.told.set_running_or_notify_cancel():
            try:
                self.told.set_result(self.act())
            except VeneerError as error:
                self.told.set_exception(error)
