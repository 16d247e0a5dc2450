"""``veneer combine``: one adapter from several, on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.arguments import weights_of
from veneer.cli.work import carried_out_by
from veneer.errors import ConfigError

_Adapters = Annotated[list[Path], typer.Argument(metavar="ADAPTER...", show_default=False, help="Adapter folders.")]
_Output = Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", show_default=False, help="Folder to write.")]
_Weights = Annotated[
    str | None,
    typer.Option(
        metavar="X...", show_default=False, help="One weight for each adapter, such as 0.7 -0.3. Default: 1 each."
    ),
]
_How = Annotated[
    str,
    typer.Option(metavar="NAME", help="linear, cat, svd, ties, dare_linear, dare_ties, magnitude_prune or factorwise."),
]
_Density = Annotated[
    float | None,
    typer.Option(metavar="X", show_default=False, help="Share of entries to keep, for ties, dare_* and pruning."),
]
_Rank = Annotated[int | None, typer.Option(metavar="N", show_default=False, help="Bring the result to this rank.")]
_Seed = Annotated[int, typer.Option(metavar="N", help="Of the draw that dare_* makes.")]
_Base = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        show_default=False,
        help="The base model; needed for DoRA and IA3 adapters, for others where their base is not here.",
    ),
]


@carried_out_by("veneer.cli.combine")
def combine(
    adapters: _Adapters,
    output: _Output,
    weights: _Weights = None,
    how: _How = "linear",
    density: _Density = None,
    rank: _Rank = None,
    seed: _Seed = 0,
    base: _Base = None,
) -> None:
    """Combine adapters of one base into a new one. The inputs are not changed.

    "linear" is the weighted sum. For LoRA it is exact, with ranks added up; --rank reduces the rank, and the error is
    printed. With DoRA the sum has full rank: without --rank, an error above 10% is refused, and the message names a
    sufficient rank.

    Example: veneer combine runs/a runs/b --weights 0.7 0.3 --rank 16 -o runs/both
    """
    if output.exists() and any(output.iterdir() if output.is_dir() else [output]):
        raise ConfigError(f"{output} exists and is not empty: choose another folder, nothing is overwritten")
    weights_of(weights, len(adapters))
