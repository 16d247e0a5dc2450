"""Progress on stderr: bars and spinners if it is a terminal that can draw them, plain lines otherwise."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn

from veneer.plain.units import duration

LINE_SECONDS = 5.0  # between two plain lines
LEAST_SHARE = 0.05  # of all steps, before a plain line tells the time left: a file's first tensors may be its largest
QUIET_SECONDS = 1.0  # of a wait before its first plain line
LIBRARIES = "loading torch, transformers"
"""Wait for the libraries that models need; a plain line tells how far the imports are."""
Tell = Callable[[int, int], None]
_WAIT: ContextVar[_Spinner | _Lines | None] = ContextVar("_WAIT", default=None)


def draws_bars(console: Console) -> bool:
    """Return True if the console is a terminal that can redraw a line: no file, no pipe, no dumb terminal."""
    return console.is_terminal and not console.is_dumb_terminal


@contextmanager
def progress_bar(title: str, *columns: ProgressColumn, opens_with: str | None = None) -> Iterator[Tell]:
    """Show a progress bar while the block runs. The block calls the function that it gets with steps done and their
    total.

    The bar appears with the first step, so that another bar may run before it; until then ``title`` is shown as a wait.
    A wait around the block (`waits_told`) pauses while the bar is there. If no bar can be drawn, a line reports the
    steps every ``LINE_SECONDS``. A block of less than ``QUIET_SECONDS`` prints nothing but ``opens_with``, if given,
    which replaces the wait. If torchrun has started several processes, only the first one prints.
    """
    # this file and no other: what takes long may have sys.stderr redirected
    console = _stderr()
    with _paused_by_steps(), waits_told(title) if opens_with is None else nullcontext():
        if opens_with is not None:
            _pause()
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
            _pause()
            progress.start()
            progress.update(task, completed=done, total=total)

        try:
            yield tell
        finally:
            progress.stop()


def _lines(title: str, console: Console) -> Tell:
    began = told = time.monotonic()
    first: int | None = None  # the steps done when the first one was reported, from which the time left follows

    def tell(done: int, total: int) -> None:
        nonlocal began, told, first
        _pause()
        now = time.monotonic()
        if first is None:
            first, began = done, now
        if now - told >= LINE_SECONDS:
            told = now
            tells = done > first and done - first >= LEAST_SHARE * total
            left = f", {duration((now - began) / (done - first) * (total - done))} left" if tells else ""
            _say(console, f"{title} {done}/{total}{left}")

    return tell


def _say(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, markup=False)


@contextmanager
def waits_told(what: str) -> Iterator[None]:
    """Report a wait for ``what`` on stderr while the block runs: by a spinner, or by lines after ``QUIET_SECONDS``.

    `waiting_for` names the next work, and `waiting_over` ends the report before the block ends. Within another wait, no
    second report begins: ``what`` is shown in the outer one. If torchrun has started several processes, only the first
    one prints.
    """
    outer = _WAIT.get()
    if outer is not None:
        before, outer.what = outer.what, what
        try:
            yield
        finally:
            outer.what = before
        return
    console = _stderr()
    wait = _Spinner(what, console) if draws_bars(console) and not console.quiet else _Lines(what, console)
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


def waiting_anew(what: str) -> None:
    """Name the next work as `waiting_for` does, and count its seconds from here."""
    wait = _WAIT.get()
    if wait is not None:
        wait.begin(what)


def waiting_heard(seconds: float) -> None:
    """Print the next line of a wait in ``seconds`` at the earliest, because another line has just been printed."""
    wait = _WAIT.get()
    if wait is not None:
        wait.put_off(seconds)


def waiting_over() -> None:
    """End the report of a wait, if there is one, before other output is printed or a bar is drawn."""
    wait = _WAIT.get()
    if wait is not None:
        wait.end()


def _pause() -> None:
    wait = _WAIT.get()
    if wait is not None:
        wait.pause()


@contextmanager
def _paused_by_steps() -> Iterator[None]:
    """Enter a context. If its steps pause the wait that is shown outside of it, resume that wait at the end."""
    outer = _WAIT.get()
    goes_on = outer is not None and not outer.paused
    try:
        yield
    finally:
        if outer is not None and goes_on:
            outer.go_on()


class _Spinner:
    """A spinner on stderr that vanishes at the end of a wait. Other lines are printed above it."""

    def __init__(self, what: str, console: Console) -> None:
        columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        # stdout is left alone: a pipe may read it
        self._progress = Progress(*columns, console=console, transient=True, redirect_stdout=False)
        self._task, self._what, self._over = self._progress.add_task(escape(what), total=None), what, False
        self.paused = False
        self._progress.start()

    @property
    def what(self) -> str:
        """The work that is waited for."""
        return self._what

    @what.setter
    def what(self, what: str) -> None:
        self._what = what
        self._progress.update(self._task, description=escape(what))

    def begin(self, what: str) -> None:
        """Show the name of the next work, and count its seconds from 0."""
        self.what = what
        self._progress.reset(self._task)

    def put_off(self, seconds: float) -> None:
        """Do nothing: a spinner is shown all the time."""

    def pause(self) -> None:
        """Remove the line until `go_on`."""
        self.paused = True
        self._progress.stop()

    def go_on(self) -> None:
        """Show the line again, if the wait is not over."""
        self.paused = False
        if not self._over:
            self._progress.start()

    def end(self) -> None:
        """Remove the line."""
        self._over = True
        self._progress.stop()


class _Lines:
    """Reporter of a wait: a thread that prints the current work and its seconds so far as plain lines."""

    def __init__(self, what: str, console: Console) -> None:
        self._console, self._over = console, threading.Event()
        self.paused = False
        self.begin(what)
        self.put_off(QUIET_SECONDS)
        self._thread = threading.Thread(target=self._tell, daemon=True)
        self._thread.start()

    def begin(self, what: str) -> None:
        """Set the name of the next work, and count its seconds from now."""
        self.what, self._began = what, time.monotonic()

    def put_off(self, seconds: float) -> None:
        """Print the next line in ``seconds``, and later ones at this interval, but at least `LINE_SECONDS` apart."""
        self._due, self._apart = time.monotonic() + seconds, max(seconds, LINE_SECONDS)

    def pause(self) -> None:
        """Print nothing until `go_on`."""
        self.paused = True

    def go_on(self) -> None:
        """Print lines again after `pause`."""
        self.paused = False

    def end(self) -> None:
        """Stop printing."""
        self._over.set()
        self._thread.join()

    def _tell(self) -> None:
        while not self._over.wait(max(0.0, self._due - time.monotonic())):
            now = time.monotonic()
            if now < self._due:  # put off meanwhile
                continue
            if not self.paused:
                modules = f": {len(sys.modules):,} modules" if self.what == LIBRARIES else ""
                _say(self._console, f"{self.what}{modules} ({now - self._began:.0f} s so far)")
            self._due = now + self._apart


def _stderr() -> Console:
    """Return the console of stderr; silent except in the first of several processes."""
    return Console(file=sys.stderr, highlight=False, quiet=os.environ.get("RANK", "0") != "0")
