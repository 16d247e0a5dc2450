"""Calls of other threads to the engine, kept in order until its next step. No torch."""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

Message = TypeVar("Message")


class Inbox(Generic[Message]):
    """A queue from any thread to the one that drains it."""

    def __init__(self) -> None:
        self._messages: deque[Message] = deque()
        self._filled = threading.Event()

    def put(self, message: Message) -> None:
        """Leave a message; never waits."""
        self._messages.append(message)
        self._filled.set()

    def drain(self) -> list[Message]:
        """All messages, oldest first; never waits."""
        self._filled.clear()  # before reading, so that what comes meanwhile sets it again
        found = []
        while self._messages:
            found.append(self._messages.popleft())
        return found

    def wait(self, seconds: float | None = None) -> bool:
        """Sleep until there is a message, at most so long; False where none came."""
        return self._filled.wait(seconds)
