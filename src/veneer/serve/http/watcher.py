"""Watcher of a folder: a thread that looks again when an entry is added or removed, and at intervals."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic

from watchfiles import watch

_SECONDS = 1.0  # between looks at everything, which find what the system does not tell
_SHARE = 0.01  # of the time, at most, that looks at everything take
_SHARE_OF_ALL = 0.05  # of the time, at most, that all looks take
_GROUPED_MS, _STEP_MS = 300, 100  # changes in so short a time are one


class Watcher:
    """Thread that calls ``look()`` if a folder's entries change, and ``look(everything=True)`` at intervals.

    The system reports added and removed entries (for example by inotify). Polling finds changes within entries, and all
    changes if the system reports none: once a second, or more rarely if it would take over 1% of the time. Calls never
    overlap.
    """

    def __init__(self, folder: Path, look: Callable[[bool], None]) -> None:
        self._folder, self._look = folder, look
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to watch."""
        self._thread = threading.Thread(target=self._work, name="veneer watcher", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop watching, and wait until a call of ``look`` in progress has ended. Does nothing if never started."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        due = monotonic() + _SECONDS
        for changed in self._changes():
            start = monotonic()
            everything = start >= due
            if not (changed or everything):
                continue
            self._look(everything)
            end = monotonic()
            if everything:
                due = end + max(_SECONDS, (end - start) / _SHARE)
            self._stopping.wait((end - start) / _SHARE_OF_ALL)

    def _changes(self) -> Iterator[bool]:
        """Yield at least once a second, True if an entry was added or removed, until the watcher is stopped."""
        while not self._stopping.is_set():
            watched = _identity(self._folder)
            try:
                for changes in watch(
                    self._folder, watch_filter=None, recursive=False, stop_event=self._stopping, yield_on_timeout=True,
                    rust_timeout=int(1000 * _SECONDS), debounce=_GROUPED_MS, step=_STEP_MS,
                ):  # fmt: skip
                    yield bool(changes)
                    if _identity(self._folder) != watched:  # another folder has its name: the system told of the old
                        break
            except (OSError, RuntimeError):  # its watches are used up, or there is no such folder
                yield False
                self._stopping.wait(_SECONDS)


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        told = folder.stat()
    except OSError:
        return None
    return told.st_dev, told.st_ino
