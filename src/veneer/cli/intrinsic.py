"""Implementation of ``veneer intrinsic``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from veneer.cli import loading
from veneer.cli.pages.intrinsic import IntrinsicArguments
from veneer.store.bars import quiet
from veneer.train.intrinsic import Curve, PointTraining, dimension_curve, draw_curve, task_of


def intrinsic(args: IntrinsicArguments) -> None:
    """Train, draw the curve and write it."""
    training = PointTraining(
        steps=args.steps, learning_rate=args.learning_rate, structure_aware=args.structure_aware, seed=args.seed
    )
    chosen = loading.choose(args.model, dtype="float32")
    batches, score = task_of(chosen.tokenizer, args.data, args.batch_size, args.held_out, args.seed)
    loaded = loading.joined(loading.loaded(chosen))
    console = Console(stderr=True)

    def tell(d: int | None, value: float) -> None:
        console.print(f"d = {'all' if d is None else d}: {value:.1%}")

    with quiet():
        curve = dimension_curve(loaded.model, batches, score, args.dimensions, training, on_point=tell)
    args.output.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {"model": args.model, "data": str(args.data), "training": asdict(training), **asdict(curve)}
    (args.output / "curve.json").write_text(json.dumps({**facts, "d90": curve.d90}, indent=2) + "\n", encoding="utf-8")
    draw_curve(curve, args.output / "curve.png")
    _show(curve, args.output)


def _show(curve: Curve, output: Path) -> None:
    table = Table(box=box.SIMPLE)
    table.add_column("d", justify="right")
    table.add_column("accuracy", justify="right")
    table.add_column("of full", justify="right")
    rows = [
        ("0", curve.before),
        *((f"{d:,}", s) for d, s in curve.scores.items()),
        (f"{curve.n_weights:,}", curve.full),
    ]
    for d, score in rows:
        table.add_row(d, f"{score:.1%}", f"{score / curve.full:.0%}" if curve.full else "-")
    Console().print(table)
    typer.echo(f"d90: {'none of these' if curve.d90 is None else f'{curve.d90:,}'}; {output}/curve.json, curve.png")
