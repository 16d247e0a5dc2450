"""``veneer combine``: one adapter from several, on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from veneer.cli import loading
from veneer.cli.arguments import weights_of
from veneer.errors import ConfigError

if TYPE_CHECKING:
    from veneer.adapters.combining import Report
    from veneer.combine import Combination

_MOST_LOST = 0.1  # of a layer's update, where nobody chose a rank


_Adapters = Annotated[list[Path], typer.Argument(metavar="ADAPTER...", show_default=False, help="Adapter folders.")]
_Output = Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", show_default=False, help="Folder to write.")]
_Weights = Annotated[
    str | None,
    typer.Option(
        metavar="X...", show_default=False, help="One weight for each adapter, such as 0.7 -0.3. Default: 1 each."
    ),
]
_How = Annotated[
    str,
    typer.Option(metavar="NAME", help="linear, cat, svd, ties, dare_linear, dare_ties, magnitude_prune or factorwise."),
]
_Density = Annotated[
    float | None,
    typer.Option(metavar="X", show_default=False, help="Share of entries to keep, for ties, dare_* and pruning."),
]
_Rank = Annotated[int | None, typer.Option(metavar="N", show_default=False, help="Bring the result to this rank.")]
_Seed = Annotated[int, typer.Option(metavar="N", help="Of the draw that dare_* makes.")]
_Base = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        show_default=False,
        help="The base model; needed for DoRA and IA3 adapters, for others where their base is not here.",
    ),
]


def combine(
    adapters: _Adapters,
    output: _Output,
    weights: _Weights = None,
    how: _How = "linear",
    density: _Density = None,
    rank: _Rank = None,
    seed: _Seed = 0,
    base: _Base = None,
) -> None:
    """Combine adapters of one base into a new one. The parts stay as they are.

    "linear" is the weighted sum: exact for LoRA, ranks add up, or --rank brings them down and the error is told. With
    DoRA the sum has full rank: without --rank, losing more than 10% is an error that names the rank to give.

    Example: veneer combine runs/a runs/b --weights 0.7 0.3 --rank 16 -o runs/both
    """
    from veneer.combine import Combination

    if output.exists() and any(output.iterdir() if output.is_dir() else [output]):
        raise ConfigError(f"{output} exists and is not empty: choose another folder, nothing is overwritten")
    numbers = weights_of(weights, len(adapters))
    loading.require_of_one_base(adapters, base)
    plan = Combination(how=how, rank=rank, density=density, seed=seed)  # type: ignore[arg-type]
    report = (
        _without_base(adapters, numbers, plan, output)
        if base is None
        else _on_base(adapters, numbers, plan, output, base)
    )
    _show(report, output)


def _without_base(adapters: list[Path], weights: list[float], plan: Combination, output: Path) -> Report:
    from veneer.adapters.combining import combine_folders

    return combine_folders(adapters, weights, plan, output)


def _on_base(adapters: list[Path], weights: list[float], plan: Combination, output: Path, base: str) -> Report:
    from veneer.adapters.combining import add_weighted
    from veneer.cli.loading import load

    names = [f"part{i}" for i in range(len(adapters))]
    model = load(base, dtype="float32").model
    from veneer.adapters.peft_model import PeftModel

    adapted = PeftModel.from_pretrained(model, adapters[0], names[0])
    for name, folder in zip(names[1:], adapters[1:], strict=True):
        adapted.load_adapter(folder, name)
    parts = list(zip(names, weights, strict=True))
    report = add_weighted(adapted, adapted.adapter_state, parts, "default", plan, most_lost=_MOST_LOST)
    adapted.save_pretrained(output, selected_adapters=["default"])
    return report


def _show(report: Report, output: Path) -> None:
    console = Console()
    if report.worst == 0:
        console.print(f"exact on all {len(report.errors)} layers: {output}")
        return
    table = Table(box=box.SIMPLE, title="relative error of the layers that lost most")
    table.add_column("layer")
    table.add_column("error", justify="right")
    for path, error in sorted(report.errors.items(), key=lambda item: -item[1])[:5]:
        table.add_row(path, f"{error:.1%}")
    console.print(table)
    mean = sum(report.errors.values()) / len(report.errors)
    console.print(f"mean {mean:.1%} over {len(report.errors)} layers; a higher --rank loses less: {output}")
