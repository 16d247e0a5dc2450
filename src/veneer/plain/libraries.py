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
    """Mapping from packages to the distributions that provide them.

    The metadata of all packages is read only if needed: at the first look-up of a package whose distribution has
    another name.
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
    """Return True if the distribution of the package's own name provides it. TRL prefers this distribution if there are
    several.
    """
    try:
        files = importlib.metadata.distribution(package).read_text("RECORD") or ""
    except importlib.metadata.PackageNotFoundError:
        return False
    return f"{package}/__init__.py," in files


@contextmanager
def libraries_loading() -> Iterator[None]:
    """Show progress while the block imports torch, transformers or TRL, and skip work that the imports do not need.

    The garbage collector is off in the block, because imports leave no garbage and its search takes a tenth of their
    time. Later it ignores the objects that the imports made. TRL asks for the distributions of a few packages; they are
    found without reading the metadata of all packages.
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
