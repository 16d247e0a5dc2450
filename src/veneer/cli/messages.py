"""Warnings on stderr: each text once, in the form of the commands' own."""

from __future__ import annotations

import logging
import os
import sys


class Once(logging.Filter):
    """Filter that drops a record if one with its text has passed before."""

    def __init__(self) -> None:
        super().__init__()
        self._passed: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return True for the first record of a text."""
        text = record.getMessage()
        new = text not in self._passed
        self._passed.add(text)
        return new


class _Named(logging.Formatter):
    """``warning: …``."""

    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {super().format(record)}"


def log_on_stderr() -> None:
    """Print logged warnings on stderr. A program that has handlers of its own keeps them.

    Of several processes, which torchrun numbers, all but the first print errors alone.
    """
    root = logging.getLogger()
    if root.handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(Once())
    handler.setFormatter(_Named())
    root.addHandler(handler)
    root.setLevel(logging.WARNING if os.environ.get("RANK", "0") == "0" else logging.ERROR)
