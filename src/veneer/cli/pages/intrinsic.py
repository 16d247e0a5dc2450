"""``veneer intrinsic``: the intrinsic dimension of a task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.arguments import require_folder
from veneer.cli.pages import options
from veneer.cli.work import carried_out_by
from veneer.plan.presets import require_weights

_Data = Annotated[
    Path, typer.Option("--data", "-d", metavar="FILE", show_default=False, help="Rows of prompt and completion.")
]
_Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="FOLDER", show_default=False, help="Folder for the curve.")
]
_Dims = Annotated[str, typer.Option(metavar="N,...", help="Dimensions to try, with commas.")]
_Steps = Annotated[int, typer.Option(metavar="N", min=1, help="Optimizer steps of each point.")]
_LearningRate = Annotated[float, typer.Option(metavar="X", help="The same for every dimension.")]
_BatchSize = Annotated[int, typer.Option(metavar="N", min=1, help="Rows in a step.")]
_HeldOut = Annotated[float, typer.Option(metavar="X", min=0.01, max=0.9, help="Share of rows to score on.")]
_StructureAware = Annotated[bool, typer.Option("--structure-aware", help="One dimension scales each layer.")]
_Seed = Annotated[int, typer.Option(metavar="N", help="Of the subspaces and of the order of rows.")]


@carried_out_by("veneer.cli.intrinsic")
def intrinsic(
    model: options.Model,
    data: _Data,
    output: _Output,
    dims: _Dims = "10,30,100,300,1000",
    steps: _Steps = 100,
    learning_rate: _LearningRate = 1e-3,
    batch_size: _BatchSize = 16,
    held_out: _HeldOut = 0.3,
    structure_aware: _StructureAware = False,
    seed: _Seed = 0,
) -> None:
    """Train in random subspaces of all weights and find d90: the fewest dimensions that reach 90% of full training.

    The completions are labels. Accuracy is the share of rows whose right label is the likeliest.

    Example: veneer intrinsic smollm2-135m-instruct -d sst2.jsonl --dims 100,300 -o d90
    """
    require_folder("--output", output)
    require_weights(model)
