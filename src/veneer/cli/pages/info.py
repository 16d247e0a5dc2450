"""``veneer info``: facts about an adapter or a model, from its headers."""

from __future__ import annotations

from typing import Annotated

import typer

from veneer.cli.facts import AsJson
from veneer.cli.work import carried_out_by


@carried_out_by("veneer.cli.info")
def info(
    what: Annotated[
        str, typer.Argument(metavar="ADAPTER|MODEL|RUN", show_default=False, help="A folder, a .gguf file or a name.")
    ],
    as_json: AsJson = False,
) -> None:
    """Show what an adapter or a model is, and how a run stands: method and targets, or architecture and size, or status
    and losses. Headers are read, no weight is loaded and no GGUF file converted.

    Example: veneer info runs/first/adapter
    """
