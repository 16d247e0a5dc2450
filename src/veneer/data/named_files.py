"""Sources of rows that name files, existing or not."""

from __future__ import annotations

import difflib
from pathlib import Path

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")


def names_a_file(source: str | Path) -> bool:
    """Return True if a source names a file, existing or not, and not a data set of the hub."""
    path = Path(source)
    in_folder = path.parent.is_dir() and (path.suffix != "" or path.parent != Path())
    return in_folder or path.exists() or path.suffix in SUFFIXES or str(source).startswith(("/", ".", "~"))


def is_missing(source: str) -> bool:
    """Return True if a source names a file that does not exist."""
    return names_a_file(source) and not Path(source).exists()


def missing_told(path: Path) -> str:
    """Return the message for a missing file, with the nearest existing name."""
    names = [each.name for each in path.parent.iterdir() if each.is_file()] if path.parent.is_dir() else []
    found = difflib.get_close_matches(path.name, names, n=1)
    return f"there is no file {path}{f'; the nearest is {path.parent / found[0]}' if found else ''}"
