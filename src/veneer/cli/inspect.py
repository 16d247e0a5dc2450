"""Implementation of ``veneer inspect``."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from veneer.analyze.heat_map import draw_norms
from veneer.analyze.report import LayerReport, PairReport, compare, describe, split_path
from veneer.analyze.spectrum import Spectrum, spectrum, spectrum_of_dense
from veneer.cli import loading
from veneer.cli.pages.inspect import InspectArguments
from veneer.combine.update import Update
from veneer.errors import CompositionError
from veneer.model.attach.attach import adapted_layers
from veneer.plain.progress import progress_bar, waits_told
from veneer.records.deltas import LinearDelta
from veneer.store.adapter.config import read_config
from veneer.store.adapter.records import NeedsBaseError, read_updates
from veneer.store.adapter.skeleton import places_in_base


def inspect(args: InspectArguments) -> None:
    """Print or draw the updates of one adapter, or of two."""
    folders = [args.adapter] if args.other is None else [args.adapter, args.other]
    loading.require_of_one_base(folders, args.base, "a comparison")
    spectra = _spectra(_updates(folders, args.base))
    first = spectra[args.adapter]
    told = {folder: describe(of, args.top) for folder, of in spectra.items()}
    second = None if args.other is None else spectra[args.other]
    with waits_told("comparing the adapters"):
        pairs = [] if second is None else compare(first, second, args.top)
    if args.png is not None:
        draw_norms({str(folder): lines for folder, lines in told.items()}, args.png)
    if args.as_json:
        typer.echo(json.dumps(_facts(told, args, pairs), indent=2))
        return
    console = Console()
    for folder, lines in told.items():
        console.print(_layers(folder, lines, args.top))
    if args.other is not None:
        console.print(_pairs(pairs, args.top))


def _updates(folders: Sequence[Path], base: str | None) -> dict[Path, dict[str, LinearDelta | Update]]:
    """Return each adapter's updates by layer: from its file alone, or computed on a base that is loaded once.

    Without ``base``, the base that the adapters name is loaded if an update depends on it. Raises CompositionError,
    before a base is loaded, if an adapter changes no weights.
    """
    if base is None:
        try:
            return {folder: dict(read_updates(folder, places_in_base(folder)).updates) for folder in folders}
        except NeedsBaseError as error:
            base = loading.own_base(folders, error)
    for folder in folders:
        config = read_config(folder)
        if not config.changes_weights:
            raise CompositionError(
                f"the adapter {folder} ({config.peft_type}) changes no weights, so it has no spectrum: give another"
            )
    chosen = loading.choose(base, list(dict.fromkeys(folders)), dtype="float32", device="cpu")
    loaded = loading.joined(loading.loaded(chosen))
    found: dict[Path, dict[str, LinearDelta | Update]] = {}
    for folder in folders:
        name = loaded.names[folder]
        layers = {path: layer for path, layer in adapted_layers(loaded.model).items() if name in layer.adapters}
        records = {path: layer.record(name) for path, layer in layers.items()}
        found[folder] = {  # a pair is decomposed by its factors, which show its rank exactly
            path: record if record.is_low_rank else Update(record, layers[path].site().weight)
            for path, record in records.items()
        }
    return found


@torch.no_grad()
def _spectra(updates: Mapping[Path, Mapping[str, LinearDelta | Update]]) -> dict[Path, dict[str, Spectrum]]:
    n, found = sum(map(len, updates.values())), dict[Path, dict[str, Spectrum]]()
    with progress_bar("decomposing updates") as on_progress:
        done = itertools.count(1)
        for folder, of in updates.items():
            found[folder] = {}
            for path, update in of.items():
                found[folder][path] = (
                    spectrum_of_dense(update.dense()) if isinstance(update, Update) else spectrum(update)
                )
                on_progress(next(done), n)
    return found


def _facts(
    told: Mapping[Path, list[LayerReport]], args: InspectArguments, pairs: list[PairReport]
) -> dict[str, list[dict[str, Any]]]:
    """Return each layer's figures for JSON: of the first adapter (``layers``), of the second (``other_layers``), and of
    both together (``pairs``).
    """
    of = {"layers": told[args.adapter], "other_layers": [] if args.other is None else told[args.other]}
    return {**{name: [asdict(x) for x in lines] for name, lines in of.items()}, "pairs": [asdict(x) for x in pairs]}


def _layers(adapter: Path, lines: list[LayerReport], top: int) -> Table:
    """Build one row for each kind of module, summed over layers, so that the table fits a terminal."""
    title = f"{adapter}: updates by module, mean over layers (least-most)"
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
