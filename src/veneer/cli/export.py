"""Implementation of ``veneer export``."""

from __future__ import annotations

from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from veneer.adapters.chosen import split_one
from veneer.adapters.requantizing import describe
from veneer.cli.bases import compare_bases
from veneer.cli.facts import print_facts
from veneer.cli.loading import load
from veneer.cli.pages.export import CheckArguments, GgufArguments, ImportanceArguments, LoraArguments, OllamaArguments
from veneer.errors import ConfigError, FormatError, listed
from veneer.export.gguf.adapter import export_lora
from veneer.export.gguf.check import check_file, compare_answers
from veneer.export.gguf.collect import CollectOptions, collect_importance
from veneer.export.gguf.mix import MixOptions
from veneer.export.gguf.model import GgufExport, GgufOptions
from veneer.export.gguf.modelfile import MODELFILE, export_ollama
from veneer.export.gguf.plan import FilePlan
from veneer.export.gguf.summary import layers_of, ranges, rows, summary
from veneer.plain.progress import progress_bar
from veneer.plain.units import size
from veneer.store.bars import quiet
from veneer.store.gguf.writer import parts_of

_ANSWERS = "half or more of its greedy tokens are those of"  # or it would have a problem
_SHOWN_LEFT_OUT = 3  # names of tensors
BESIDE = "To keep all of it, leave the adapter beside its base: `veneer export lora` writes it for llama.cpp's --lora"


def gguf(args: GgufArguments) -> None:
    """Write a GGUF file, or print its plan."""
    base, adapter = split_one(args.model, args.adapter)
    compare_bases(adapter, base)
    mix = MixOptions(
        pure=args.pure, output=args.output_type, embedding=args.embedding_type, by_name=_by_name(args.tensor_type or [])
    )
    shared: dict[str, Any] = {
        "overwrite": args.force,
        "max_part_bytes": _bytes(args.split_size),
        "importance": args.importance,
    }
    options = GgufOptions(type=args.type_, mix=mix, dtype=args.dtype, name=args.name, **shared)
    with quiet():
        export = GgufExport(base, adapter, options)
        if args.dry_run:
            print_plan(export.plan, len(parts_of(export.plan.specs, options.max_part_bytes)))
            return
        with progress_bar("exporting") as on_progress:
            report = export.write(args.output, on_progress)
    tell_notes(report.plan)
    merged = f", {report.n_modules} modules changed by the adapter" if adapter else ""
    parts = f"{report.paths[0]} and {len(report.paths) - 1} more parts" if len(report.paths) > 1 else str(args.output)
    typer.echo(f"{parts}: {summary(report.plan.specs)}, {size(report.n_bytes)}{merged}")
    if report.survival:
        typer.echo(f"note: {describe(report.survival, BESIDE)}", err=True)


def ollama(args: OllamaArguments) -> None:
    """Write a folder for ``ollama create``."""
    base, adapter = split_one(args.model, args.adapter)
    compare_bases(adapter, base)
    options = GgufOptions(type=args.type_, overwrite=args.force, importance=args.importance)
    with quiet(), progress_bar("exporting") as on_progress:
        report = export_ollama(base, args.output, options, adapter=adapter, on_progress=on_progress)
    tell_notes(report.gguf.plan)
    typer.echo(f"{args.output}: {summary(report.gguf.plan.specs)}, {size(report.gguf.n_bytes)}")
    if not report.has_template:
        reason = "the chat template is more than texts around messages, so that the Modelfile has no TEMPLATE"
        typer.echo(f"note: {reason}. Ollama uses the template of the GGUF file if it knows it", err=True)
    typer.echo(f"next: ollama create {args.output.name} -f {args.output / MODELFILE}", err=True)


def lora(args: LoraArguments) -> None:
    """Write an adapter as a GGUF file."""
    compare_bases(args.adapter, args.base)
    with quiet():
        report = export_lora(args.adapter, args.output, base=args.base, type=args.type_, overwrite=args.force)
    typer.echo(f"{args.output}: {report.n_modules} modules, {size(report.n_bytes)}")
    typer.echo("note: Ollama takes no adapters since 0.34.1; give it a merged file (veneer export gguf)", err=True)


def importance(args: ImportanceArguments) -> None:
    """Write an importance matrix."""
    options = CollectOptions(chunk_size=args.chunk_size, n_chunks=args.chunks, overwrite=args.force)
    loaded = load(args.model, args.adapter)
    with quiet(), progress_bar("collecting") as on_progress:
        n_windows = collect_importance(loaded.model, loaded.tokenizer, args.data, args.output, options, on_progress)
    typer.echo(f"{args.output}: {n_windows} windows of {args.chunk_size} tokens")


def check(args: CheckArguments) -> None:
    """Read a whole GGUF file, and print its contents."""
    with quiet(), progress_bar("reading") as on_progress:
        report = check_file(args.file, on_progress)
        facts, problems = dict(report.facts), list(report.problems)
    if args.model is not None:
        ours, theirs = load(str(args.file), dtype="float32"), load(args.model, args.adapter, dtype="float32")
        compared = compare_answers(ours.model, theirs.model, (ours.tokenizer, theirs.tokenizer))
        facts, problems = facts | compared.facts, [*problems, *compared.problems]
    print_facts(facts)
    if problems:
        raise FormatError(
            listed(
                problems,
                f"{args.file} is not as it should be",
                remedy="Convert the model again, with `veneer export gguf` or the converter that wrote the file",
            )
        )
    typer.echo(f"{args.file} is as it should be{'' if args.model is None else f': {_ANSWERS} {args.model}'}")


def _by_name(given: list[str]) -> list[tuple[str, str]]:
    """Return the pairs of ``--tensor-type``. Raises ConfigError for one without its equals sign."""
    wrong = [each for each in given if not all(each.rpartition("=")[::2])]
    if wrong:
        raise ConfigError(f"--tensor-type {wrong[0]!r} must be REGEX=TYPE, such as 'ffn_down=Q6_K'")
    return [(pattern, kind) for pattern, _, kind in (each.rpartition("=") for each in given)]


def _bytes(given: str | None) -> int | None:
    """Return the number of bytes that ``4G`` or ``500M`` means (10^9, 10^6), or None for None. Raises ConfigError for
    any other text.
    """
    if given is None:
        return None
    number, unit = given[:-1], given[-1:].upper()
    if not number.isdigit() or unit not in ("M", "G") or int(number) == 0:
        raise ConfigError(f"--split-size {given!r} must be a whole number of M or G, such as 4G")
    return int(number) * (10**6 if unit == "M" else 10**9)


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
        more = f" and {len(names) - _SHOWN_LEFT_OUT} more" if len(names) > _SHOWN_LEFT_OUT else ""
        typer.echo(f"note: left out, no part of the model: {', '.join(names[:_SHOWN_LEFT_OUT])}{more}", err=True)
