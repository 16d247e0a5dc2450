"""Logged warnings on stderr."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from veneer.cli import messages
from veneer.cli.messages import Once, log_on_stderr


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
    ("rank", "told"),
    [("0", "warning: torn 3\nwarning: torn 4\nerror: gone\nerror: gone\n"), ("1", "error: gone\nerror: gone\n")],
)
def test_a_warning_is_printed_once_and_every_error(monkeypatch: pytest.MonkeyPatch, rank: str, told: str) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr("sys.stderr", stderr)
    monkeypatch.setenv("RANK", rank)
    with bare_root():
        log_on_stderr()
        log_on_stderr()
        for name in ("a", "b"):
            for value in (3, 3, 4):
                logging.getLogger(name).warning("torn %d", value)
        for _ in range(2):
            logging.getLogger("a").error("gone")
    assert stderr.getvalue() == told


def test_few_texts_are_known_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "_MOST_TEXTS", 2)
    once = Once()
    texts = ["a", "b", "a", "c", "b", "a"]
    records = [logging.LogRecord("n", logging.WARNING, "", 0, text, None, None) for text in texts]
    assert [once.filter(record) for record in records] == [True, True, False, True, True, True]


def test_handlers_of_the_program_stay() -> None:
    with bare_root(logging.NullHandler()) as root:
        before = list(root.handlers)
        log_on_stderr()
        assert root.handlers == before
