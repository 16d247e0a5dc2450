"""Warnings about adapters that name another base than the given one, the same for every verb."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from veneer.store.adapter.fit import base_warnings, require_undamaged
from veneer.store.source import resolve


def warn(warnings: Sequence[str]) -> None:
    """Print warnings on stderr."""
    for said in warnings:
        typer.echo(f"warning: {said}", err=True)


def compare_bases(adapter: Path | None, base: str | None) -> None:
    """Print a warning if an adapter names a base other than this one. If it names none, or ``base`` is None, print
    nothing.

    Raises the errors of `require_undamaged` and `resolve`.
    """
    if adapter is not None and base is not None:
        require_undamaged(adapter)
        warn(base_warnings([adapter], base, resolve(base)))
