"""``veneer export as-lora``: an adapter of any method that changes weights as plain LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.arguments import require_model
from veneer.cli.pages.options import unset
from veneer.cli.work import verb
from veneer.errors import ConfigError
from veneer.store.adapter.folder import require_adapter


@dataclass(frozen=True, kw_only=True)
class AsLoraArguments:
    """Write an adapter of another method as plain LoRA, and print the error in the update and in the logits.

    An update that is a low-rank pair stays exact. Any other change of weights is reduced to --rank.

    Example: veneer export as-lora runs/a/adapter -o runs/a/lora --rank 16
    """

    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", show_default=False, help="The folder of an adapter.")]
    output: Annotated[Path, unset("FOLDER", "The folder to write.", "--output", "-o")]
    rank: Annotated[int | None, unset("N", "Rank to write at most; by default only what is exact.", min=1)] = None
    task: Annotated[int | None, unset("N", "Which of its tasks, if it has several (Poly).", min=0)] = None
    base: Annotated[str | None, unset("MODEL", "Its base; by default the one that it names.")] = None

    def __post_init__(self) -> None:
        require_adapter(self.adapter)
        if self.output.exists() and any(self.output.iterdir() if self.output.is_dir() else [self.output]):
            raise ConfigError(f"{self.output} exists and is not empty: choose another folder, nothing is overwritten")
        require_model(self.base)


as_lora = verb(AsLoraArguments, "veneer.cli.export_as_lora", "as_lora")
