"""Warnings and errors on stderr, in the form of the commands' own; a repeated warning is dropped."""

from __future__ import annotations

import logging
import os
import sys

from veneer.plain.lru import LruCache

_MOST_TEXTS = 1000  # that are known at once: a server runs for months


class Once(logging.Filter):
    """Filter that drops a warning whose text has passed before. Errors all pass."""

    def __init__(self) -> None:
        super().__init__()
        self._passed: LruCache[str, bool] = LruCache(_MOST_TEXTS)

    def filter(self, record: logging.LogRecord) -> bool:
        """Return True for an error, and for the first warning with a text."""
        if record.levelno >= logging.ERROR:
            return True
        text = record.getMessage()
        is_new = self._passed.get(text) is None
        self._passed.put(text, True)
        return is_new


class _Named(logging.Formatter):
    """Formatter that puts the level before a message: ``warning: …``."""

    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {super().format(record)}"


def log_on_stderr() -> None:
    """Print logged warnings on stderr, unless the program has handlers of its own.

    Among several processes, which torchrun numbers, only the first prints warnings; the others print errors.
    """
    root = logging.getLogger()
    if root.handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(Once())
    handler.setFormatter(_Named())
    root.addHandler(handler)
    root.setLevel(logging.WARNING if os.environ.get("RANK", "0") == "0" else logging.ERROR)
