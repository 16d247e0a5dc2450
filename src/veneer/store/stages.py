"""Progress of a fetch on stderr: a bar for each stage in a terminal, plain lines elsewhere, nothing if it is cached."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from veneer.disk.wheel import Progress as OnProgress
from veneer.plain.progress import LINE_SECONDS, draws_bars
from veneer.plain.units import duration, size

_BYTES = "download"  # the stage that counts bytes


@contextmanager
def stages_shown() -> Iterator[OnProgress]:
    """Yield a progress callback that takes a stage, the amount done, and the total, which is 0 as long as it is
    unknown.
    """
    console = Console(file=sys.stderr, highlight=False)
    if not draws_bars(console):
        yield _Lines(console).tell
        return
    columns = (TextColumn("{task.description:>8}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[done]}"))
    with Progress(*columns, console=console, redirect_stderr=False) as progress:
        tasks: dict[str, TaskID] = {}

        def tell(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=None, done="")
            known = total > 1 or done == total > 0
            progress.update(
                tasks[stage], completed=done, total=total if known else None, done=_told(stage, done, total)
            )

        yield tell


class _Lines:
    """Print a line when a stage begins, one with its progress every ``LINE_SECONDS``, and one when it ends."""

    def __init__(self, console: Console) -> None:
        self._console, self._stage, self._last, self._began, self._ended = console, "", 0.0, 0.0, False

    def tell(self, stage: str, done: int, total: int) -> None:
        now, begins, ends = time.monotonic(), stage != self._stage, done == total > 0
        if begins:
            self._stage, self._began, self._ended = stage, now, False
        if self._ended or not (begins or ends or now - self._last >= LINE_SECONDS):
            return
        self._last, self._ended = now, ends
        told = f"done in {duration(now - self._began)}" if ends else _told(stage, done, total)
        self._console.print(f"{stage} {told}".strip(), soft_wrap=True, markup=False)


def _told(stage: str, done: int, total: int) -> str:
    if stage == _BYTES:
        return f"{size(done)} of {size(total)}"
    return f"{done}/{total}" if total > 1 else ""
