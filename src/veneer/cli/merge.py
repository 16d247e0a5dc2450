"""Implementation of ``veneer merge``."""

from __future__ import annotations

from pathlib import Path

import typer

from veneer.core.progress import progress_bar
from veneer.core.units import size
from veneer.export.merged import MergeOptions, merge_checkpoint
from veneer.store.bars import quiet


def merge(*, base: str, adapter: Path, output: Path, dtype: str | None, force: bool) -> None:
    """Write the merged model, and print its contents."""
    with quiet(), progress_bar("merging") as on_progress:
        report = merge_checkpoint(base, adapter, output, MergeOptions(dtype=dtype, overwrite=force), on_progress)
    apart = ", tied embeddings written apart" if report.untied else ""
    written = f"{report.n_tensors} tensors, {size(report.n_bytes)}"
    typer.echo(f"{output}: {report.n_modules} modules changed, {written}{apart}")
