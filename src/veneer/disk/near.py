"""Existing paths that look most like one that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from itertools import islice
from pathlib import Path

_ALIKE = 0.6
_MOST = 1000  # entries of a folder that are compared


def near_paths(path: Path, *, folders: bool = False) -> list[str]:
    """Return up to two existing paths that look most like a missing one; with ``folders``, only folders.

    Only the first missing part of ``path`` is replaced, by the name of a neighbour. The parts after it are kept as far
    as they exist there. A relative path gives relative ones.
    """
    exists = Path.is_dir if folders else Path.exists
    parts = path.parts
    for at, part in enumerate(parts):
        parent = Path(*parts[:at])
        if exists(parent / part):
            continue
        names = [name for name in _names(parent) if exists(parent / name)]
        near = difflib.get_close_matches(part, names, n=2, cutoff=_ALIKE)
        return [str(_followed(parent / name, parts[at + 1 :], exists)) for name in near]
    return []


def _names(folder: Path) -> list[str]:
    """Return the names in a folder except hidden ones; none if it cannot be read."""
    try:
        entries = (entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
        return sorted(islice(entries, _MOST))
    except OSError:
        return []


def _followed(path: Path, parts: tuple[str, ...], exists: Callable[[Path], bool]) -> Path:
    for part in parts:
        if not exists(path / part):
            break
        path /= part
    return path
