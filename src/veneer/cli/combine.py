"""Implementation of ``veneer combine``."""

from __future__ import annotations

from pathlib import Path

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from veneer.adapters.combining import Report, add_weighted, combine_folders, require_rank
from veneer.adapters.peft_model import PeftModel
from veneer.cli import loading
from veneer.cli.arguments import weights_of
from veneer.cli.pages.combine import CombineArguments
from veneer.combine import SPARSE, Combination
from veneer.plain.progress import Tell, progress_bar
from veneer.store.adapter.records import NeedsBaseError

_MOST_LOST = 0.1  # of a layer's update, where nobody chose a rank


def combine(args: CombineArguments) -> None:
    """Write the combined adapter, and print how far it is from the exact combination."""
    numbers = weights_of(args.weights, len(args.adapters))
    loading.require_of_one_base(args.adapters, args.base, "their sum")
    plan = Combination(how=args.how, rank=args.rank, density=args.density, seed=args.seed)  # type: ignore[arg-type]
    if plan.how in SPARSE:
        typer.echo(f"{plan.how} combines whole updates: it decomposes one matrix for each layer", err=True)
    with progress_bar("combining layer") as on_progress:
        report = _combined(args, numbers, plan, on_progress)
    _show(report, args.output)


def _combined(args: CombineArguments, weights: list[float], plan: Combination, on_progress: Tell) -> Report:
    """Combine the adapters from their files alone if no base is given and none is needed, otherwise on the base."""
    base = args.base
    if base is None:
        try:
            return combine_folders(args.adapters, weights, plan, args.output, on_progress=on_progress)
        except NeedsBaseError as error:
            require_rank(args.adapters, plan)
            base = loading.own_base(args.adapters, error)
            loading.require_of_one_base(args.adapters, base, "their sum")
    else:
        require_rank(args.adapters, plan)
    return _on_base(args.adapters, weights, plan, args.output, base, on_progress)


def _on_base(
    adapters: list[Path], weights: list[float], plan: Combination, output: Path, base: str, on_progress: Tell
) -> Report:
    names = [f"part{i}" for i in range(len(adapters))]
    adapted = PeftModel.from_pretrained(loading.load(base, dtype="float32", device="cpu").model, adapters[0], names[0])
    for name, folder in zip(names[1:], adapters[1:], strict=True):
        adapted.load_adapter(folder, name)
    parts = list(zip(names, weights, strict=True))
    report = add_weighted(
        adapted, adapted.adapter_state, parts, "default", plan, most_lost=_MOST_LOST, on_progress=on_progress
    )
    adapted.save_pretrained(output, selected_adapters=["default"])
    return report


def _show(report: Report, output: Path) -> None:
    console = Console()
    if report.worst == 0:
        console.print(f"exact on all {len(report.errors)} layers, written to {output}")
        return
    console.print("the sum is reduced to a rank; the relative error of the layers that lost most:")
    table = Table(box=box.SIMPLE)
    table.add_column("layer")
    table.add_column("error", justify="right")
    for path, error in sorted(report.errors.items(), key=lambda item: -item[1])[:5]:
        table.add_row(path, f"{error:.1%}")
    console.print(table)
    mean = sum(report.errors.values()) / len(report.errors)
    console.print(
        f"the mean is {mean:.1%} over {len(report.errors)} layers; a higher --rank loses less. Written to {output}"
    )
