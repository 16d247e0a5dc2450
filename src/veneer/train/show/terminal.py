"""The abilities of a terminal."""

from __future__ import annotations

from rich.console import Console


def draws_bars(console: Console) -> bool:
    """Return True if the console is a terminal that can redraw a line: no file, no pipe, no dumb terminal."""
    return console.is_terminal and not console.is_dumb_terminal
