"""Implementation of ``veneer merge``."""

from __future__ import annotations

import typer

from veneer.cli.bases import compare_bases
from veneer.cli.pages.merge import MergeArguments
from veneer.export.merged import MergeOptions, merge_checkpoint
from veneer.plain.progress import progress_bar
from veneer.plain.units import size
from veneer.store.bars import quiet


def merge(args: MergeArguments) -> None:
    """Write the merged model, and print its contents."""
    compare_bases(args.adapter, args.base)
    with quiet(), progress_bar(f"merging into {args.output}") as on_progress:
        report = merge_checkpoint(
            args.base, args.adapter, args.output, MergeOptions(dtype=args.dtype, overwrite=args.force), on_progress
        )
    apart = ", tied embeddings written apart" if report.untied else ""
    written = f"{report.n_tensors} tensors, {size(report.n_bytes)}"
    typer.echo(f"{args.output}: {report.n_modules} modules changed, {written}{apart}")
