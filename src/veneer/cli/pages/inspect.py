"""``veneer inspect``: the updates of an adapter, layer by layer, and how two adapters relate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.arguments import require_file
from veneer.cli.facts import AsJson
from veneer.cli.work import carried_out_by


@carried_out_by("veneer.cli.inspect")
def inspect(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", show_default=False, help="An adapter folder.")],
    other: Annotated[
        Path | None, typer.Argument(metavar="OTHER", show_default=False, help="Another one, to compare with.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", show_default=False, help="The base model; needed for DoRA and IA3 adapters."),
    ] = None,
    top: Annotated[int, typer.Option(metavar="N", min=1, help="The number of leading directions to count.")] = 4,
    png: Annotated[
        Path | None,
        typer.Option(metavar="FILE", show_default=False, help="Write a heat map of the norms here (of both adapters)."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the norm, effective rank and energy of every update; for two adapters, shared directions and sign conflicts.

    Example: veneer inspect runs/a runs/b --png heat.png
    """
    if png is not None:
        require_file("--png", png, ".png")
