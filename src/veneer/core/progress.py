"""Progress on stderr: bars if it is a terminal that can draw them, plain lines otherwise; and long waits by name."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from rich.console import Console
from rich.progress import Progress, ProgressColumn

LINE_SECONDS = 10.0  # between two plain lines
QUIET_SECONDS = 4.0  # of a wait that nobody needs to be told of
Tell = Callable[[int, int], None]
_WAIT: ContextVar[_Wait | None] = ContextVar("_WAIT", default=None)


def draws_bars(console: Console) -> bool:
    """Return True if the console is a terminal that can redraw a line: no file, no pipe, no dumb terminal."""
    return console.is_terminal and not console.is_dumb_terminal


@contextmanager
def progress_bar(title: str, *columns: ProgressColumn, opens_with: str | None = None) -> Iterator[Tell]:
    """Show a bar while the block runs. The block moves it by the function that it gets: steps done, and their total.

    The bar appears with the first step, so that another may come and go before it. If no bar can be drawn, a line
    reports the steps every ``LINE_SECONDS``. A shorter block prints nothing but ``opens_with``, if given. Of several
    processes, which torchrun numbers, the first one prints.
    """
    # this file and no other: what takes long may have sys.stderr redirected
    console = Console(file=sys.stderr, highlight=False, quiet=os.environ.get("RANK", "0") != "0")
    if not draws_bars(console):
        if opens_with is not None:
            _say(console, opens_with)
        yield _lines(title, console)
        return
    progress = Progress(*columns, console=console, transient=True)
    task = progress.add_task(title, total=None)
    if opens_with is not None:
        progress.start()

    def tell(done: int, total: int) -> None:
        progress.start()
        progress.update(task, completed=done, total=total)

    try:
        yield tell
    finally:
        progress.stop()


def _lines(title: str, console: Console) -> Tell:
    told = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told >= LINE_SECONDS:
            told = time.monotonic()
            _say(console, f"{title} {done}/{total}")

    return tell


def _say(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, markup=False)


@contextmanager
def waits_told(what: str) -> Iterator[None]:
    """Report a wait for ``what`` on stderr, from the fifth second on, while the block runs. `waiting_for` names the
    next.

    Of several processes, which torchrun numbers, the first one prints.
    """
    console = Console(file=sys.stderr, highlight=False, quiet=os.environ.get("RANK", "0") != "0")
    wait = _Wait(what, console)
    token = _WAIT.set(wait)
    try:
        yield
    finally:
        _WAIT.reset(token)
        wait.end()


def waiting_for(what: str) -> None:
    """Name the work that runs from here on. Outside of `waits_told` it is not printed."""
    wait = _WAIT.get()
    if wait is not None:
        wait.what = what


class _Wait:
    """A thread that prints what is waited for, and for how long so far."""

    def __init__(self, what: str, console: Console) -> None:
        self.what, self._console, self._over = what, console, threading.Event()
        self._thread = threading.Thread(target=self._tell, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Nothing is printed behind this."""
        self._over.set()
        self._thread.join()

    def _tell(self) -> None:
        began, pause = time.monotonic(), QUIET_SECONDS
        while not self._over.wait(pause):
            _say(self._console, f"{self.what} ({time.monotonic() - began:.0f} s so far)")
            pause = LINE_SECONDS
