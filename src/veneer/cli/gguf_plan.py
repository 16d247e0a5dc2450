"""A planned GGUF file in a terminal: its size, and the types of its tensors, equal layers in one row."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import typer

from veneer.core.units import size

if TYPE_CHECKING:
    from veneer.export.gguf.plan import Plan
    from veneer.store.gguf.writer import TensorSpec

_SHOWN = 3  # of the tensors that were left out


def print_plan(plan: Plan, n_parts: int) -> None:
    """Print the file as it would be, on stdout: first the whole, then its tensors."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    parts = f" in {n_parts} parts" if n_parts > 1 else ""
    typer.echo(f"{summary(plan.specs)}, {size(plan.nbytes)}{parts}; nothing was written")
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in ("tensor", "shape", "type", "size"):
        table.add_column(column, justify="right" if column in ("shape", "size") else "left", no_wrap=True)
    table.add_column("layers", overflow="fold")
    for (leaf, kind, shape), alike in rows(plan.specs).items():
        nbytes, layers = sum(spec.nbytes for spec in alike), ranges(_layers(alike))
        table.add_row(leaf, " x ".join(map(str, shape)), kind, size(nbytes), layers)
    Console().print(table)
    tell_notes(plan)


def rows(specs: Sequence[TensorSpec]) -> dict[tuple[str, str, tuple[int, ...]], list[TensorSpec]]:
    """Tensors by name without the layer, type and shape: those of several layers that are alike stand together."""
    order = {leaf: place for place, leaf in enumerate(dict.fromkeys(_leaf(spec.name) for spec in specs))}
    found: dict[tuple[str, str, tuple[int, ...]], list[TensorSpec]] = {}
    for spec in sorted(specs, key=lambda spec: order[_leaf(spec.name)]):
        found.setdefault((_leaf(spec.name), spec.kind, spec.shape), []).append(spec)
    return found


def ranges(numbers: Iterable[int]) -> str:
    """``0-3, 7`` for 0, 1, 2, 3 and 7."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def summary(specs: Sequence[TensorSpec]) -> str:
    """``272 tensors (180 Q5_0, 61 F32, …), 6.17 bits a weight``."""
    kinds = Counter(spec.kind for spec in specs)
    n_weights = sum(math.prod(spec.shape) for spec in specs)
    bits = 8 * sum(spec.nbytes for spec in specs) / n_weights
    listed = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
    return f"{len(specs)} tensors ({listed}), {bits:.2f} bits a weight"


def tell_notes(plan: Plan) -> None:
    """Print notes for the file's user, and the parts of the checkpoint that are not in it, on stderr."""
    for note in plan.notes:
        typer.echo(f"note: {note}", err=True)
    if names := plan.left_out:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        typer.echo(f"note: left out, no part of the model: {', '.join(names[:_SHOWN])}{more}", err=True)


def _layers(specs: Iterable[TensorSpec]) -> list[int]:
    return [int(spec.name.split(".")[1]) for spec in specs if spec.name.startswith("blk.")]


def _leaf(name: str) -> str:
    """A tensor's name without its layer."""
    return name.split(".", 2)[-1] if name.startswith("blk.") else name
