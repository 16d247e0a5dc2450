"""``veneer merge``: a base with a merged adapter, as a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.work import carried_out_by
from veneer.errors import ConfigError


@carried_out_by("veneer.cli.merge")
def merge(
    base: Annotated[
        str,
        typer.Option(metavar="MODEL", show_default=False, help="A folder, a .gguf file, a fetched name or a hub id."),
    ],
    adapter: Annotated[Path, typer.Option(metavar="FOLDER", show_default=False, help="The folder of the adapter.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", show_default=False, help="The folder to write.")
    ],
    dtype: Annotated[
        str | None,
        typer.Option(metavar="NAME", show_default=False, help="float32, bfloat16 or float16; by default the base's."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is in the output folder.")] = False,
) -> None:
    """Merge an adapter into its base and write an ordinary model folder, tensor by tensor: any size fits in memory.

    Example: veneer merge --base smollm2-135m-instruct --adapter runs/a -o merged
    """
    if not adapter.is_dir():
        raise ConfigError(f"no adapter {str(adapter)!r}: there is no such folder")
