"""Progress bars on stderr, where it is a terminal that can draw them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, ProgressColumn


def draws_bars(console: Console) -> bool:
    """Return True if the console is a terminal that can redraw a line: no file, no pipe, no dumb terminal."""
    return console.is_terminal and not console.is_dumb_terminal


@contextmanager
def progress_bar(title: str, *columns: ProgressColumn) -> Iterator[Callable[[int, int], None]]:
    """Show a bar while the block runs, moved by the function that it is given: steps done, and their total."""
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not draws_bars(console)) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
