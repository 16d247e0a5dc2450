"""Writes the record of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from veneer.errors import DiskError
from veneer.train.checkpoint import write_json
from veneer.train.processes import is_main
from veneer.train.record.record import RUN_FILE


class WrittenRecord:
    """Writer of a run's record ``run.json``, which acts in the main process alone.

    ``changed(step)`` returns the changes of settings of a run that resumes after ``step``.
    """

    def __init__(
        self, output: Path, record: dict[str, Any], changed: Callable[[int], list[dict[str, Any]]] | None = None
    ) -> None:
        self.record, self._path, self._changed, self._begun = record, output / RUN_FILE, changed, False

    def begin(self, step: int) -> None:
        """Record that training begins after ``step``. From now on the file describes this run."""
        found = [] if self._changed is None else self._changed(step)
        if found:
            self.record["changes"] = found
        self._begun = True
        self._write({**self.record, "status": "running"})

    def finish(self, results: Mapping[str, Any]) -> None:
        """Record that the run has finished."""
        self.record |= results
        self._write(self.record)

    def end(self, how: Mapping[str, Any]) -> None:
        """Record that the run ended early, with the facts ``how``, if it had begun."""
        if self._begun:
            with suppress(DiskError):  # where the disk is full, the error that says so is the one to tell
                self._write({**self.record, **how})

    def _write(self, values: Mapping[str, Any]) -> None:
        if is_main():
            write_json(self._path, values)
