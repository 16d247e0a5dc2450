"""``veneer merge``: a base with a merged adapter, as a model folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.arguments import require_folder, require_model
from veneer.cli.pages.options import unset
from veneer.cli.work import verb
from veneer.store.adapter.folder import require_adapter


@dataclass(frozen=True, kw_only=True)
class MergeArguments:
    """Merge an adapter into its base and write an ordinary model folder, tensor by tensor: any size fits in memory.

    Example: veneer merge --base smollm2-135m-instruct --adapter runs/a -o merged
    """

    base: Annotated[
        str,
        unset("MODEL", "A folder, a .gguf file, a fetched name or a hub id."),
    ]
    adapter: Annotated[Path, unset("FOLDER", "The folder of the adapter.")]
    output: Annotated[Path, unset("FOLDER", "The folder to write.", "--output", "-o")]
    dtype: Annotated[
        str | None,
        unset("NAME", "float32, bfloat16 or float16; by default the base's."),
    ] = None
    force: Annotated[bool, typer.Option("--force", help="Replace what is in the output folder.")] = False

    def __post_init__(self) -> None:
        require_folder("--output", self.output, replaces=self.force)
        require_adapter(self.adapter)
        require_model(self.base)


merge = verb(MergeArguments, "veneer.cli.merge", "merge")
