"""``veneer export vllm``: adapters as plain LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.arguments import require_model
from veneer.cli.pages.options import Force, unset
from veneer.cli.work import verb
from veneer.export.vllm.ranks import require_rank
from veneer.store.adapter.folder import require_adapter


@dataclass(frozen=True, kw_only=True)
class VllmArguments:
    """Write adapters as plain LoRA for vLLM and LoRAX, each into a folder of its name in --output.

    An update that is a low-rank pair stays exact, whatever its method. Any other change of weights is reduced to
    --rank, and the table shows the relative error. An adapter that cannot be LoRA is refused with the reason.

    Example: veneer export vllm runs/a/adapter runs/b/adapter -o lora --rank 64
    """

    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER...", show_default=False, help="Adapter folders.")]
    output: Annotated[Path, unset("FOLDER", "Folder for the written ones.", "--output", "-o")]
    rank: Annotated[int | None, unset("N", "Rank to write at most: 8, 16, 32, 64, 128, 256, 320 or 512.")] = None
    base: Annotated[str | None, unset("MODEL", "Their base; by default the one that each names.")] = None
    ends: Annotated[
        bool, typer.Option("--ends", help="Keep LoRA of embeddings and head, which some models of vLLM take.")
    ] = False
    force: Force = False

    def __post_init__(self) -> None:
        require_rank(self.rank)
        for adapter in self.adapters:
            require_adapter(adapter)
        require_model(self.base)


vllm = verb(VllmArguments, "veneer.cli.export_vllm", "vllm")
