"""Imports of torch, transformers and TRL, which take most of the seconds before a first step."""

from __future__ import annotations

import gc
import importlib.metadata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from veneer.plain.progress import LIBRARIES, waits_told

_read = importlib.metadata.packages_distributions


class _WhenAsked(Mapping[str, list[str]]):
    """The distributions of each package, read from the metadata of all that is installed once one is asked for."""

    def __init__(self) -> None:
        self._found: Mapping[str, list[str]] | None = None

    def __getitem__(self, package: str) -> list[str]:
        return self._all[package]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    @property
    def _all(self) -> Mapping[str, list[str]]:
        self._found = _read() if self._found is None else self._found
        return self._found


@contextmanager
def libraries_loading() -> Iterator[None]:
    """Tell the wait for imports in the block, and leave out work that they do not need.

    Imports leave no garbage, and looking for it takes a tenth of their time. TRL reads the metadata of all packages
    for questions that it asks of few.
    """
    collects = gc.isenabled()
    importlib.metadata.packages_distributions = _WhenAsked
    gc.disable()
    try:
        with waits_told(LIBRARIES):
            yield
    finally:
        importlib.metadata.packages_distributions = _read
        if collects:
            gc.enable()
