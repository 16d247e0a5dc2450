"""Implementation of ``veneer merge-models``."""

from __future__ import annotations

import typer

from veneer.cli.arguments import weights_of
from veneer.cli.pages.merge_models import MergeModelsArguments
from veneer.combine.task_vectors import TaskVectors
from veneer.export.combined import CombineOptions, combine_checkpoints
from veneer.plain.progress import progress_bar
from veneer.plain.units import size


def merge_models(args: MergeModelsArguments) -> None:
    """Write the combined model, and print its contents."""
    plan = TaskVectors(
        how=args.how,  # type: ignore[arg-type]
        density=args.density,
        normalize=args.normalize,
        scale=args.scale,
        vote=args.vote,  # type: ignore[arg-type]
        seed=args.seed,
    )
    pairs = list(zip(args.models, weights_of(args.weights, len(args.models)), strict=True))
    with progress_bar("merging") as on_progress:
        options = CombineOptions(overwrite=args.force)
        n_bytes = combine_checkpoints(args.base, pairs, args.output, plan, options=options, on_progress=on_progress)
    typer.echo(f"{args.output}: {len(args.models)} models by {args.how}, {size(n_bytes)}")
