"""Messages of other threads to the engine, kept in order until its next step. No torch."""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

Message = TypeVar("Message")


class Inbox(Generic[Message]):
    """Queue from any thread to the one that takes from it."""

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
