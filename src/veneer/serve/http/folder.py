"""Adapters in a folder, each named after its subfolder: a table that a watcher updates."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Collection, Iterable
from collections.abc import Set as AbstractSet
from pathlib import Path

from veneer.contract.file import CONFIG_FILE, WEIGHTS_FILE
from veneer.serve.http.watcher import Watcher
from veneer.store.adapter.folder import PICKLE_FILE


class AdapterFolder:
    """Table of the adapters in a folder, except those named in ``taken``. Any thread may call it.

    Each request for an adapter checks its two files, so that additions and removals count at once. A watcher finds all
    other changes. ``on_gone`` is called with the names of removed adapters, on the thread that notices the removal.
    Without `start`, no watcher runs: only requests and `look` update the table.
    """

    def __init__(self, folder: Path, taken: Collection[str], on_gone: Callable[[AbstractSet[str]], None]) -> None:
        self.folder, self._taken, self._on_gone = folder, frozenset(taken), on_gone
        self._there: set[str] = set()
        self._withdrawn: set[str] = set()  # of those, the ones that are not served
        self._incomplete: dict[str, str] = {}  # of the others, those with a file of an adapter: the reasons
        self._sorted: tuple[str, ...] | None = None
        self._lock = threading.Lock()
        self._looking = threading.Lock()
        self._watcher = Watcher(folder, self.look)
        self.look()

    def start(self) -> None:
        """Keep the table up to date from now on."""
        self._watcher.start()

    def stop(self) -> None:
        """Stop watching the folder."""
        self._watcher.stop()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters that are served, sorted. The same tuple object is returned until an adapter is added or
        removed.
        """
        with self._lock:
            if self._sorted is None:
                self._sorted = tuple(sorted(self._there - self._withdrawn))
            return self._sorted

    @property
    def incomplete(self) -> dict[str, str]:
        """Folders that have a file of an adapter but are no adapters, at the latest `look`: name to reason."""
        with self._lock:
            return {name: reason for name, reason in self._incomplete.items() if name not in self._there}

    def why_not(self, name: str) -> str | None:
        """Check one folder now; return the reason why it is not an adapter, as in `incomplete`."""
        return why_incomplete(self.folder / name) if is_entry(name) and name not in self._taken else None

    def has(self, name: str) -> bool:
        """Check one adapter now; return True if it exists and is served."""
        if not is_entry(name) or name in self._taken:
            return False
        if not is_adapter(self.folder / name):
            self._change((), {name})
            return False
        if name not in self._there:
            self._change({name}, ())
        return name not in self._withdrawn

    def withdraw(self, name: str) -> None:
        """Stop serving an adapter until `restore` is called, or until its folder is removed and added again."""
        with self._lock:
            self._withdrawn.add(name)
            self._sorted = None
        self._on_gone({name})

    def restore(self, name: str) -> None:
        """Serve an adapter again."""
        with self._lock:
            self._withdrawn.discard(name)
            self._sorted = None

    def look(self, everything: bool = True) -> None:
        """Find added and removed adapters. If ``everything``, also check the files of the known adapters."""
        with self._looking:
            known, entries = self._there.copy(), _entries(self.folder) - self._taken
            there = {
                name for name in entries if (name in known and not everything) or is_adapter(self.folder / name)
            }  # fmt: skip
            reasons = {name: why_incomplete(self.folder / name) for name in sorted(entries - there)}
            self._incomplete = {name: reason for name, reason in reasons.items() if reason is not None}
            came, went = there - known, known - there
            # One may have come since its folder was listed: two files say.
            self._change(came, {name for name in went if not is_adapter(self.folder / name)})

    def _change(self, came: Iterable[str], went: Collection[str]) -> None:
        with self._lock:
            gone = self._there & set(went)
            new = set(came) - self._there
            self._there = (self._there | new) - gone if gone or new else self._there
            self._withdrawn -= gone
            self._sorted = None if gone or new else self._sorted
        if gone:
            self._on_gone(gone)


def is_adapter(folder: Path) -> bool:
    """Return True if a folder has both files of an adapter now."""
    return all(os.path.isfile(folder / name) for name in (CONFIG_FILE, WEIGHTS_FILE))  # False for a name too long


def why_incomplete(folder: Path) -> str | None:
    """Return the reason why a folder is no adapter; None if it is one, or has no file of an adapter."""
    held = [name for name in (CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE) if os.path.isfile(folder / name)]
    if not held or {CONFIG_FILE, WEIGHTS_FILE} <= set(held):
        return None
    if CONFIG_FILE not in held:
        return f"it holds {held[0]} and no {CONFIG_FILE}. Copy that there"
    if PICKLE_FILE in held:
        return f"its weights are a pickle ({PICKLE_FILE}), which is not read. Save them as {WEIGHTS_FILE}"
    return f"it holds {CONFIG_FILE} and no {WEIGHTS_FILE}. Copy that there"


def is_entry(name: str) -> bool:
    """Return True if a name can be an entry of the folder: it has no path separators, and UTF-8 can encode it."""
    return name not in ("", ".", "..") and not {"/", "\0"} & set(name) and not re.search("[\ud800-\udfff]", name)


def _entries(folder: Path) -> set[str]:
    try:
        return set(filter(is_entry, os.listdir(folder)))
    except OSError:  # it is gone, and may come again
        return set()
