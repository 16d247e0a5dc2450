"""Logged warnings on stderr."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from veneer.cli.messages import log_on_stderr


@contextmanager
def bare_root(*handlers: logging.Handler) -> Iterator[logging.Logger]:
    """Give the root logger with these handlers alone; its own and its level come back after the block."""
    root = logging.getLogger()
    own, level, root.handlers = root.handlers, root.level, list(handlers)
    try:
        yield root
    finally:
        root.handlers = own
        root.setLevel(level)


@pytest.mark.parametrize(
    ("rank", "told"), [("0", "warning: torn 3\nwarning: torn 4\nerror: gone\n"), ("1", "error: gone\n")]
)
def test_a_text_is_printed_once(monkeypatch: pytest.MonkeyPatch, rank: str, told: str) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr("sys.stderr", stderr)
    monkeypatch.setenv("RANK", rank)
    with bare_root():
        log_on_stderr()
        log_on_stderr()
        for name in ("a", "b"):
            for value in (3, 3, 4):
                logging.getLogger(name).warning("torn %d", value)
        logging.getLogger("a").error("gone")
    assert stderr.getvalue() == told


def test_handlers_of_the_program_stay() -> None:
    with bare_root(logging.NullHandler()) as root:
        before = list(root.handlers)
        log_on_stderr()
        assert root.handlers == before
