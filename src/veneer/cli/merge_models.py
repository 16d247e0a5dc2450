"""Implementation of ``veneer merge-models``."""

from __future__ import annotations

from pathlib import Path

import typer

from veneer.cli.arguments import weights_of
from veneer.combine.task_vectors import TaskVectors
from veneer.core.progress import progress_bar
from veneer.core.units import size
from veneer.export.combined import CombineOptions, combine_checkpoints


def merge_models(
    *,
    base: str,
    models: list[str],
    output: Path,
    weights: str | None,
    how: str,
    density: float | None,
    normalize: bool | None,
    scale: float,
    vote: str,
    seed: int,
    force: bool,
) -> None:
    """Write the combined model, and print its contents."""
    plan = TaskVectors(
        how=how,  # type: ignore[arg-type]
        density=density,
        normalize=normalize,
        scale=scale,
        vote=vote,  # type: ignore[arg-type]
        seed=seed,
    )
    pairs = list(zip(models, weights_of(weights, len(models)), strict=True))
    with progress_bar("merging") as on_progress:
        options = CombineOptions(overwrite=force)
        n_bytes = combine_checkpoints(base, pairs, output, plan, options=options, on_progress=on_progress)
    typer.echo(f"{output}: {len(models)} models by {how}, {size(n_bytes)}")
