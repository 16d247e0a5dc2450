"""``veneer merge-models``: fine-tuned models of one base as one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.work import carried_out_by

_Base = Annotated[str, typer.Argument(metavar="BASE", help="The model that all were tuned from.")]
_Models = Annotated[list[str], typer.Argument(metavar="MODEL...", help="Fine-tuned models: folders or hub ids.")]
_Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="FOLDER", show_default=False, help="The folder to write.")
]
_Weights = Annotated[
    str | None,
    typer.Option(
        metavar="X...", show_default=False, help="One weight for each model, such as 0.7 -0.3. Default: 1 each."
    ),
]
_How = Annotated[str, typer.Option(metavar="NAME", help="task_arithmetic, ties, dare_linear or dare_ties.")]
_Density = Annotated[
    float | None,
    typer.Option(metavar="X", show_default=False, help="Share of entries to keep, for ties and dare_*."),
]
_Normalize = Annotated[
    bool | None,
    typer.Option("--normalize/--no-normalize", show_default=False, help="Divide by the weights (ties: yes)."),
]
_Scale = Annotated[float, typer.Option(metavar="X", help="The factor of the combined task vector.")]
_Vote = Annotated[str, typer.Option(metavar="NAME", help="The election of a sign: total (by values) or frequency.")]
_Seed = Annotated[int, typer.Option(metavar="N", help="Of the draw that dare_* makes.")]
_Force = Annotated[bool, typer.Option("--force", help="Replace what is in the output folder.")]


@carried_out_by("veneer.cli.merge_models")
def merge_models(
    base: _Base,
    models: _Models,
    output: _Output,
    weights: _Weights = None,
    how: _How = "task_arithmetic",
    density: _Density = None,
    normalize: _Normalize = None,
    scale: _Scale = 1.0,
    vote: _Vote = "total",
    seed: _Seed = 0,
    force: _Force = False,
) -> None:
    """Add the changes of several fine-tuned models to their base, tensor by tensor: any size fits in memory.

    Example: veneer merge-models base tuned-a tuned-b --weights 0.7 0.3 -o both
    """
