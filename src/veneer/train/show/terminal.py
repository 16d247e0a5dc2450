"""Progress on stderr: bars where it is a terminal that can draw them, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, ProgressColumn

LINE_SECONDS = 10.0  # between two plain lines


def draws_bars(console: Console) -> bool:
    """Return True if the console is a terminal that can redraw a line: no file, no pipe, no dumb terminal."""
    return console.is_terminal and not console.is_dumb_terminal


@contextmanager
def progress_bar(title: str, *columns: ProgressColumn) -> Iterator[Callable[[int, int], None]]:
    """Show a bar while the block runs, moved by the function that it is given: steps done, and their total.

    Where none can be drawn, a line tells them every ``LINE_SECONDS``; what takes less time prints nothing.
    """
    console = Console(stderr=True, highlight=False)
    if not draws_bars(console):
        yield _lines(title, console)
        return
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _lines(title: str, console: Console) -> Callable[[int, int], None]:
    told = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told >= LINE_SECONDS:
            told = time.monotonic()
            console.print(f"{title} {done}/{total}", soft_wrap=True, markup=False)

    return tell
