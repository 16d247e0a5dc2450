"""Progress on stderr: bars where it is a terminal that can draw them, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, ProgressColumn

LINE_SECONDS = 10.0  # between two plain lines
Tell = Callable[[int, int], None]


def draws_bars(console: Console) -> bool:
    """Return True if the console is a terminal that can redraw a line: no file, no pipe, no dumb terminal."""
    return console.is_terminal and not console.is_dumb_terminal


@contextmanager
def progress_bar(title: str, *columns: ProgressColumn, opens_with: str | None = None) -> Iterator[Tell]:
    """Show a bar while the block runs, moved by the function that it is given: steps done, and their total.

    The bar appears with the first step, so that another may come and go before it. Where none can be drawn, a line
    tells them every ``LINE_SECONDS``; what takes less time prints nothing but ``opens_with``, where that is given. Of
    several processes, which torchrun numbers, the first one tells.
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
