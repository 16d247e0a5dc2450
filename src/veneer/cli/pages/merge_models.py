"""``veneer merge-models``: fine-tuned models of one base as one model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.arguments import require_folder, require_model, weights_of
from veneer.cli.pages.options import unset
from veneer.cli.work import verb

_Weights = Annotated[str | None, unset("X...", "One weight for each model, such as 0.7 -0.3. Default: 1 each.")]
_How = Annotated[str, typer.Option(metavar="NAME", help="task_arithmetic, ties, dare_linear or dare_ties.")]
_Normalize = Annotated[
    bool | None,
    typer.Option("--normalize/--no-normalize", show_default=False, help="Divide by the weights (ties: yes)."),
]
_Vote = Annotated[str, typer.Option(metavar="NAME", help="The election of a sign: total (by values) or frequency.")]


@dataclass(frozen=True, kw_only=True)
class MergeModelsArguments:
    """Add the changes of several fine-tuned models to their base, tensor by tensor: any size fits in memory.

    Example: veneer merge-models base tuned-a tuned-b --weights 0.7 0.3 -o both
    """

    base: Annotated[str, typer.Argument(metavar="BASE", help="The model that all were tuned from.")]
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Fine-tuned models: folders or hub ids.")]
    output: Annotated[Path, unset("FOLDER", "The folder to write.", "--output", "-o")]
    weights: _Weights = None
    how: _How = "task_arithmetic"
    density: Annotated[float | None, unset("X", "Share of entries to keep, for ties and dare_*.")] = None
    normalize: _Normalize = None
    scale: Annotated[float, typer.Option(metavar="X", help="The factor of the combined task vector.")] = 1.0
    vote: _Vote = "total"
    seed: Annotated[int, typer.Option(metavar="N", help="Of the draw that dare_* makes.")] = 0
    force: Annotated[bool, typer.Option("--force", help="Replace what is in the output folder.")] = False

    def __post_init__(self) -> None:
        require_folder("--output", self.output, replaces=self.force)
        weights_of(self.weights, len(self.models))
        require_model(self.base, *self.models)


merge_models = verb(MergeModelsArguments, "veneer.cli.merge_models", "merge_models")
