"""Imports of torch, transformers and TRL, which take most of the seconds before a first step."""

from __future__ import annotations

import atexit
import gc
import importlib.metadata
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from veneer.plain.import_table import table_kept
from veneer.plain.progress import LIBRARIES, waits_told

_read = importlib.metadata.packages_distributions


class _WhenAsked(Mapping[str, list[str]]):
    """Mapping of packages to their distributions. All metadata is read only for a package unlike its distribution's
    name.
    """

    def __init__(self) -> None:
        self._found: Mapping[str, list[str]] | None = None

    def __getitem__(self, package: str) -> list[str]:
        own = self._found is None and _has_own_name(package)
        return [package] if own else self._all[package]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    @property
    def _all(self) -> Mapping[str, list[str]]:
        self._found = _read() if self._found is None else self._found
        return self._found


def _has_own_name(package: str) -> bool:
    """Return True if a distribution of the package's own name provides it; TRL prefers that one."""
    try:
        files = importlib.metadata.distribution(package).read_text("RECORD") or ""
    except importlib.metadata.PackageNotFoundError:
        return False
    return f"{package}/__init__.py," in files


@contextmanager
def libraries_loading() -> Iterator[None]:
    """Tell the wait for imports in the block, and leave out work that they do not need.

    Imports leave no garbage, and looking for it takes a tenth of their time. Later looks pass over what the first
    imports of a process made. TRL reads the metadata of all packages for questions
    that it asks of few.
    """
    collects, first = gc.isenabled(), "torch" not in sys.modules
    importlib.metadata.packages_distributions = _WhenAsked
    gc.disable()
    try:
        with waits_told(LIBRARIES), table_kept():
            yield
    finally:
        importlib.metadata.packages_distributions = _read
        if first:
            gc.freeze()
            atexit.register(gc.unfreeze)  # what is still frozen when the program ends counts as leaked elsewhere
        if collects:
            gc.enable()
