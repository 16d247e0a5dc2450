"""``veneer inspect``: the updates of an adapter, layer by layer, and how two adapters relate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.arguments import require_bases, require_file, require_model
from veneer.cli.facts import AsJson
from veneer.cli.pages.options import unset
from veneer.cli.work import verb
from veneer.store.adapter.folder import require_adapter


@dataclass(frozen=True, kw_only=True)
class InspectArguments:
    """Show the norm, effective rank and energy of every update; for two adapters, shared directions and sign conflicts.

    Example: veneer inspect runs/a runs/b --png heat.png
    """

    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", show_default=False, help="An adapter folder.")]
    other: Annotated[
        Path | None, typer.Argument(metavar="OTHER", show_default=False, help="Another one, to compare with.")
    ] = None
    base: Annotated[
        str | None,
        unset("MODEL", "Base model of adapters that depend on it (DoRA, IA3, OFT). Default: the one that they name."),
    ] = None
    top: Annotated[int, typer.Option(metavar="N", min=1, help="The number of leading directions to count.")] = 4
    png: Annotated[
        Path | None,
        unset("FILE", "Write a heat map of the norms here (of both adapters)."),
    ] = None
    as_json: AsJson = False

    def __post_init__(self) -> None:
        for adapter in (self.adapter, self.other):
            require_adapter(adapter)
        if self.png is not None:
            require_file("--png", self.png, ".png")
        require_model(self.base)
        require_bases([self.adapter] if self.other is None else [self.adapter, self.other], self.base)


inspect = verb(InspectArguments, "veneer.cli.inspect", "inspect")
