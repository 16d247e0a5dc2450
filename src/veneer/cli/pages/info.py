"""``veneer info``: facts about an adapter or a model, from its headers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from veneer.cli.facts import AsJson
from veneer.cli.work import verb
from veneer.store.hub import require_found


@dataclass(frozen=True, kw_only=True)
class InfoArguments:
    """Show facts about an adapter, a model or a run: method and targets, architecture and size, or status and losses.

    Only headers are read: no weight is loaded, and no GGUF file is converted.

    Example: veneer info runs/first/adapter
    """

    what: Annotated[
        str, typer.Argument(metavar="ADAPTER|MODEL|RUN", show_default=False, help="A folder, a .gguf file or a name.")
    ]
    as_json: AsJson = False

    def __post_init__(self) -> None:
        require_found(self.what)


info = verb(InfoArguments, "veneer.cli.info", "info")
