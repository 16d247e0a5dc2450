"""``veneer intrinsic``: the intrinsic dimension of a task."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from veneer.cli import loading
from veneer.cli.arguments import require_folder

if TYPE_CHECKING:
    from veneer.train.intrinsic import Curve


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


def intrinsic(
    model: loading.Model,
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

    The completions are labels; accuracy is how often the right one is the likeliest.

    Example: veneer intrinsic smollm2-135m-instruct -d sst2.jsonl --dims 100,300 -o d90
    """
    from veneer.train.intrinsic import Training, dimension_curve, draw_curve

    training = Training(steps=steps, learning_rate=learning_rate, structure_aware=structure_aware, seed=seed)
    dimensions = _dimensions(dims)
    require_folder("--output", output)
    chosen = loading.choose(model, dtype="float32")
    batches, score = _task(chosen.tokenizer, data, batch_size, held_out, seed)
    loaded = chosen.load().joined()
    console = Console(stderr=True)

    def tell(d: int | None, value: float) -> None:
        console.print(f"d = {'all' if d is None else d}: {value:.1%}")

    with loading.quiet():
        curve = dimension_curve(loaded.model, batches, score, dimensions, training, on_point=tell)
    output.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {"model": model, "data": str(data), "training": asdict(training), **asdict(curve)}
    (output / "curve.json").write_text(json.dumps({**facts, "d90": curve.d90}, indent=2) + "\n", encoding="utf-8")
    draw_curve(curve, output / "curve.png")
    _show(curve, output)


def _dimensions(dims: str) -> list[int]:
    from veneer.errors import ConfigError

    try:
        found = [int(d) for d in dims.split(",")]
    except ValueError as error:
        raise ConfigError(f"--dims {dims!r} must be whole numbers with commas between them") from error
    if min(found) < 1:
        raise ConfigError(f"--dims {dims!r} must be 1 or more")
    return found


def _task(tokenizer: Any, data: Path, batch_size: int, held_out: float, seed: int) -> tuple[list[Any], Any]:
    """Batches to train on, and a function that scores a model on the rows held out."""
    from veneer.data.collating import Collator
    from veneer.data.encoding import Encoder, kind_of
    from veneer.data.rows import RowReader, load_rows, split_off
    from veneer.evaluate.accuracy import Choice, label_accuracy, require_few
    from veneer.evaluate.questions import QuestionReader

    rows, held = split_off(load_rows(data, RowReader()).shuffle(seed=seed), held_out, seed)
    encoder = Encoder(tokenizer=tokenizer, kind=kind_of(rows.column_names, "text"), completion_only=True)
    encoded = [encoder(row, number) for number, row in enumerate(rows)]
    collate = Collator(pad_token_id=tokenizer.pad_token_id or 0)
    batches = [collate(encoded[i : i + batch_size]) for i in range(0, len(encoded), batch_size)]
    reader = QuestionReader(tokenizer=tokenizer)
    questions = reader.read(held)
    labels = reader.all_answers([*rows, *held])
    require_few(labels)
    Choice.of(tokenizer, questions, labels)
    return batches, lambda model: label_accuracy(model, tokenizer, questions, labels).value


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
