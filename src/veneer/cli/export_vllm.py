"""Implementation of ``veneer export vllm``."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from veneer.cli.bases import compare_bases
from veneer.cli.pages.export_vllm import VllmArguments
from veneer.errors import CompositionError, ConfigError, FormatError
from veneer.export.gguf.metadata import name_of
from veneer.export.vllm.adapter import VllmOptions, VllmReport, export_vllm
from veneer.export.vllm.ranks import holding
from veneer.plain.progress import progress_bar
from veneer.plain.units import size
from veneer.store.bars import quiet
from veneer.store.named import folder_of

_LOST = 0.2
"""Of the norm of an update: a larger error is told as a loss."""


def vllm(args: VllmArguments) -> None:
    """Write each adapter that can be expressed as LoRA, and print a table. Raises CompositionError, with the reasons,
    if there are adapters that cannot be.
    """
    options = VllmOptions(base=args.base, rank=args.rank, ends=args.ends, overwrite=args.force)
    folders = _folders(args.adapters, args.output)
    written: dict[str, VllmReport] = {}
    refused: dict[str, str] = {}
    for name, adapter in folders.items():
        try:
            compare_bases(adapter, args.base)
            with quiet(), progress_bar(f"exporting {name}") as on_progress:
                written[name] = export_vllm(adapter, args.output / name, options, on_progress)
        except (CompositionError, ConfigError, FormatError) as error:
            refused[name] = str(error)
    if written:
        _show(written)
        typer.echo(_next(written, args.output), err=True)
    if refused:
        of = f" ({len(refused)} of {len(folders)})" if len(folders) > 1 else ""
        raise CompositionError(f"not written{of}: " + "\n".join(refused.values()))


def _folders(adapters: list[Path], output: Path) -> dict[str, Path]:
    """Map the name of each new folder to its adapter. Raises ConfigError if two adapters would have one name."""
    found: dict[str, Path] = {}
    for adapter in adapters:
        name = name_of(adapter)
        if name in found:
            raise ConfigError(
                f"{found[name]} and {adapter} would both be written to {output / name}: export one of them into "
                "another folder"
            )
        found[name] = adapter
    return found


def _show(written: Mapping[str, VllmReport]) -> None:
    table = Table(box=box.SIMPLE)
    for title in ("adapter", "method", "written"):
        table.add_column(title, no_wrap=True)
    for title in ("rank", "layers", "size", "error", "worst"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, report in written.items():
        how = "as it is" if report.copied else "reduced" if report.error else "exact"
        errors = (f"{report.error:.2%}", f"{report.worst:.2%}") if report.error else ("0", "")
        table.add_row(name, report.method, how, str(report.rank), str(report.n_layers), size(report.n_bytes), *errors)
    Console().print(table)
    for name, report in written.items():
        if report.error:
            typer.echo(f"{name}: worst layer {report.worst_layer}")
        if report.error > _LOST:
            typer.echo(
                f"{name} will answer otherwise than it was trained to: {report.error:.0%} of its change is lost. Raise "
                "--rank, or merge it into its base (`veneer merge`)"
            )


def _next(written: Mapping[str, VllmReport], output: Path) -> str:
    """Return the line that starts vLLM with the written adapters."""
    most = holding(max(report.rank for report in written.values()))
    base = next((report.base for report in written.values() if report.base), None)
    modules = " ".join(shlex.quote(f"{name}={output / name}") for name in written)
    model = shlex.quote(_for_vllm(base))
    return f"next: vllm serve {model} --enable-lora --max-lora-rank {most} --lora-modules {modules}"


def _for_vllm(base: str | None) -> str:
    """Return a name of the base that vLLM accepts: its id on the hub, or its folder."""
    try:
        return "BASE" if base is None else str(folder_of(base) or base)
    except ConfigError:  # not on this machine
        return "BASE"
