"""Plan of a GGUF file in a terminal: its size, and the types of its tensors, equal layers in one row."""

from __future__ import annotations

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from veneer.export.gguf.plan import FilePlan
from veneer.export.gguf.summary import layers_of, ranges, rows, summary
from veneer.plain.units import size

_SHOWN = 3  # of the tensors that were left out


def print_plan(plan: FilePlan, n_parts: int) -> None:
    """Print the planned file on stdout: first its totals, then its tensors."""
    parts = f" in {n_parts} parts" if n_parts > 1 else ""
    typer.echo(f"{summary(plan.specs)}, {size(plan.nbytes)}{parts}; nothing was written")
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in ("tensor", "shape", "type", "size"):
        table.add_column(column, justify="right" if column in ("shape", "size") else "left", no_wrap=True)
    table.add_column("layers", overflow="fold")
    for (leaf, kind, shape), alike in rows(plan.specs).items():
        nbytes, layers = sum(spec.nbytes for spec in alike), ranges(layers_of(alike))
        table.add_row(leaf, " x ".join(map(str, shape)), kind, size(nbytes), layers)
    Console().print(table)
    tell_notes(plan)


def tell_notes(plan: FilePlan) -> None:
    """Print notes for the file's user, and the omitted parts of the checkpoint, on stderr."""
    for note in plan.notes:
        typer.echo(f"note: {note}", err=True)
    if names := plan.left_out:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        typer.echo(f"note: left out, no part of the model: {', '.join(names[:_SHOWN])}{more}", err=True)
