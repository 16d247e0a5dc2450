"""``veneer inspect``: the updates of an adapter, layer by layer, and how two adapters relate."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from veneer.cli import loading
from veneer.cli.arguments import require_file
from veneer.cli.facts import AsJson

if TYPE_CHECKING:
    from veneer.analyze.report import LayerReport, PairReport
    from veneer.analyze.spectrum import Spectrum


def inspect(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", show_default=False, help="An adapter folder.")],
    other: Annotated[
        Path | None, typer.Argument(metavar="OTHER", show_default=False, help="Another one, to compare with.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", show_default=False, help="The base model; needed for DoRA and IA3 adapters."),
    ] = None,
    top: Annotated[int, typer.Option(metavar="N", min=1, help="The number of leading directions to count.")] = 4,
    png: Annotated[
        Path | None,
        typer.Option(metavar="FILE", show_default=False, help="Write a heat map of the norms here (of both adapters)."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the norm, effective rank and energy of every update; for two adapters, shared directions and sign conflicts.

    Example: veneer inspect runs/a runs/b --png heat.png
    """
    from veneer.analyze.report import compare, describe

    if png is not None:
        require_file("--png", png, ".png")
    loading.require_of_one_base([adapter] if other is None else [adapter, other], base)
    first = _spectra(adapter, base)
    lines = describe(first, top)
    second = None if other is None else _spectra(other, base)
    pairs = [] if second is None else compare(first, second, top)
    if png is not None:
        from veneer.analyze.heat_map import draw_norms

        drawn = {str(adapter): lines}
        if second is not None:
            drawn[str(other)] = describe(second, top)
        draw_norms(drawn, png)
    if as_json:
        typer.echo(json.dumps({"layers": [asdict(x) for x in lines], "pairs": [asdict(x) for x in pairs]}, indent=2))
        return
    console = Console()
    console.print(_layers(lines, top))
    if other is not None:
        console.print(_pairs(pairs, top))


def _spectra(folder: Path, base: str | None) -> dict[str, Spectrum]:
    from veneer.analyze.spectrum import spectrum, spectrum_of_dense
    from veneer.combine.update import Update
    from veneer.store.adapter.records import read_updates
    from veneer.store.adapter.skeleton import places_in_base

    if base is None:
        return {path: spectrum(record) for path, record in read_updates(folder, places_in_base(folder)).updates.items()}
    from veneer.cli.loading import load
    from veneer.model.attach import adapted_layers

    loaded = load(base, folder, dtype="float32")
    name, layers = loaded.names[folder], adapted_layers(loaded.model)
    updates = {path: Update(layer.record(name), layer.site().weight) for path, layer in layers.items()}
    return {path: spectrum_of_dense(update.dense().detach()) for path, update in updates.items()}


def _layers(lines: list[LayerReport], top: int) -> Table:
    """One row a kind of module, over its layers: a table that fits a terminal however deep the model is."""
    title = "updates by module, mean over layers (least-most)"
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), title=title)
    whole = ("module", "norm", "effective rank")  # the headings of the others may break
    for name in ("module", "layers", "norm", "effective rank", "of rank", f"energy in top {top}"):
        table.add_column(name, justify="left" if name == "module" else "right", no_wrap=name in whole)
    for module in dict.fromkeys(line.module for line in lines):
        of = [line for line in lines if line.module == module]
        norms, effective = [x.norm for x in of], [x.effective_rank for x in of]
        energy = sum(x.energy for x in of) / len(of)
        rank = max(x.rank for x in of)
        table.add_row(module, str(len(of)), _span(norms, 3), _span(effective, 1), str(rank), f"{energy:.0%}")
    return table


def _pairs(pairs: list[PairReport], top: int) -> Table:
    from veneer.analyze.report import split_path

    table = Table(box=box.SIMPLE, title=f"both adapters, {len(pairs)} shared layers")
    for name in ("module", f"overlap of top {top}", "by chance", "sign conflict"):
        table.add_column(name, justify="left" if name == "module" else "right", no_wrap=name == "module")
    for module in dict.fromkeys(split_path(p.path)[1] for p in pairs):
        of = [p for p in pairs if split_path(p.path)[1] == module]
        chance = sum(p.chance for p in of) / len(of)
        table.add_row(module, _span([p.overlap for p in of], 3), f"{chance:.3f}", _span([p.conflict for p in of], 3))
    return table


def _span(values: list[float], digits: int) -> str:
    digits = max(digits + 1 - len(str(int(max(values)))), 0)  # as wide for large numbers as for small ones
    return f"{sum(values) / len(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"
