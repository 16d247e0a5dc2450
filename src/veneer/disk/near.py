"""Paths nearest to one that leads nowhere."""

from __future__ import annotations

import difflib
from pathlib import Path

_ALIKE = 0.6
_MOST = 1000  # entries of a folder that are compared


def near_paths(path: Path, n: int = 2) -> list[str]:
    """Return up to ``n`` existing paths that look most like a missing one, as it is written.

    Only its first missing part is replaced, by a name beside it. What follows is kept as far as it exists there.
    """
    parts = path.parts
    for at, part in enumerate(parts):
        parent = Path(*parts[:at])
        if (parent / part).exists():
            continue
        names = _names(parent)
        near = difflib.get_close_matches(part, names, n=n, cutoff=_ALIKE)
        return [str(_followed(parent / name, parts[at + 1 :])) for name in near]
    return []


def _names(folder: Path) -> list[str]:
    """The names in a folder without hidden ones; none if it cannot be read."""
    try:
        return sorted(entry.name for entry, _ in zip(folder.iterdir(), range(_MOST), strict=False))
    except OSError:
        return []


def _followed(path: Path, parts: tuple[str, ...]) -> Path:
    for part in parts:
        if not (path / part).exists():
            break
        path /= part
    return path
