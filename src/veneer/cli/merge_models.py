"""``veneer merge-models``: fine-tuned models of one base as one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from veneer.core.units import size
from veneer.train.terminal import draws_bars


def merge_models(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model that all were tuned from.")],
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Fine-tuned models: folders or hub ids.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", show_default=False, help="The folder to write.")
    ],
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="X...", show_default=False, help="One weight for each model, such as 0.7 -0.3. Default: 1 each."
        ),
    ] = None,
    how: Annotated[
        str, typer.Option(metavar="NAME", help="task_arithmetic, ties, dare_linear or dare_ties.")
    ] = "task_arithmetic",
    density: Annotated[
        float | None,
        typer.Option(metavar="X", show_default=False, help="Share of entries to keep, for ties and dare_*."),
    ] = None,
    normalize: Annotated[
        bool | None,
        typer.Option("--normalize/--no-normalize", show_default=False, help="Divide by the weights (ties: yes)."),
    ] = None,
    scale: Annotated[float, typer.Option(metavar="X", help="What the combined task vector is multiplied by.")] = 1.0,
    vote: Annotated[
        str, typer.Option(metavar="NAME", help="How a sign is elected: total (by values) or frequency.")
    ] = "total",
    seed: Annotated[int, typer.Option(metavar="N", help="Of the draw that dare_* makes.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace what is in the output folder.")] = False,
) -> None:
    """Add what several models learned to their base, tensor by tensor: any size fits in memory.

    Example: veneer merge-models base tuned-a tuned-b --weights 0.7 0.3 -o both
    """
    from veneer.cli.combine import weights_of
    from veneer.combine.task_vectors import TaskVectors
    from veneer.export.combined import CombineOptions, combine_checkpoints

    plan = TaskVectors(
        how=how,  # type: ignore[arg-type]
        density=density,
        normalize=normalize,
        scale=scale,
        vote=vote,  # type: ignore[arg-type]
        seed=seed,
    )
    pairs = list(zip(models, weights_of(weights, len(models)), strict=True))
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not draws_bars(console)) as progress:
        task = progress.add_task("merging", total=None)
        n_bytes = combine_checkpoints(
            base,
            pairs,
            output,
            plan,
            CombineOptions(overwrite=force),
            lambda done, total: progress.update(task, completed=done, total=total),
        )
    typer.echo(f"{output}: {len(models)} models by {how}, {size(n_bytes)}")
