"""``veneer export``: models and adapters in the formats of other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from veneer.cli.arguments import require_file, require_folder
from veneer.cli.facts import print_facts
from veneer.cli.gguf_plan import print_plan, summary, tell_notes
from veneer.cli.help import VerbCommand, first_sentence, print_page
from veneer.cli.loading import Adapter, Model
from veneer.core.progress import progress_bar
from veneer.core.units import size
from veneer.errors import ConfigError, FormatError

Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="FILE", show_default=False, help="The .gguf file to write.")
]
Type = Annotated[
    str, typer.Option("--type", "-t", metavar="NAME", help="F32, F16, BF16, Q8_0, Q4_K_M and so on; see docs/gguf.md.")
]
Dtype = Annotated[
    str | None,
    typer.Option(metavar="NAME", show_default=False, help="Round weights to this dtype first; by default the base's."),
]


class ExportGroup(TyperGroup):
    """The formats, as verbs of their own."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the page of the group: every format with its first sentence."""
        print_page(self, ctx, [(name, first_sentence(verb)) for name, verb in self.commands.items()])

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """``FORMAT …``."""
        return ["FORMAT", "[ARGUMENTS]", "[OPTIONS]"]


Name = Annotated[str | None, typer.Option(metavar="TEXT", show_default=False, help="The model's name in the file.")]
TensorTypes = Annotated[
    list[str] | None,
    typer.Option(metavar="REGEX=TYPE", show_default=False, help="The type of tensors so named; may be repeated."),
]
OutputType = Annotated[str | None, typer.Option(metavar="TYPE", show_default=False, help="The type of the head.")]
EmbeddingType = Annotated[
    str | None, typer.Option(metavar="TYPE", show_default=False, help="The type of the embeddings.")
]
Pure = Annotated[bool, typer.Option("--pure", help="Every matrix in the one type, without a mix.")]
SplitSize = Annotated[
    str | None,
    typer.Option(metavar="SIZE", show_default=False, help="Split into parts of at most this size, such as 4G."),
]
Importance = Annotated[
    Path | None, typer.Option(metavar="FILE", show_default=False, help="An importance matrix to quantize by.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]


def gguf(
    model: Model,
    output: Output,
    adapter: Adapter = None,
    type_: Type = "Q4_K_M",
    dtype: Dtype = None,
    name: Name = None,
    tensor_type: TensorTypes = None,
    output_type: OutputType = None,
    embedding_type: EmbeddingType = None,
    pure: Pure = False,
    importance: Importance = None,
    split_size: SplitSize = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print types and sizes; write nothing.")] = False,
    force: Force = False,
) -> None:
    """Write a model as a GGUF file for llama.cpp, Ollama and LM Studio: merged, converted and quantized in one go.

    Example: veneer export gguf smollm2-135m-instruct --adapter runs/a/adapter -o a.gguf
    """
    from veneer.cli.loading import quiet, split_one
    from veneer.export.gguf.mix import MixOptions
    from veneer.export.gguf.model import GgufExport, GgufOptions
    from veneer.store.gguf.writer import parts_of

    require_file("--output", output, ".gguf")
    base, adapter = split_one(model, adapter)
    _require_adapter(adapter)
    mix = MixOptions(pure=pure, output=output_type, embedding=embedding_type, by_name=_by_name(tensor_type or []))
    shared: dict[str, Any] = {"overwrite": force, "max_part_bytes": _bytes(split_size), "importance": importance}
    options = GgufOptions(type=type_, mix=mix, dtype=dtype, name=name, **shared)
    with quiet():
        export = GgufExport(base, adapter, options)
        if dry_run:
            print_plan(export.plan, len(parts_of(export.plan.specs, options.max_part_bytes)))
            return
        with progress_bar("exporting") as on_progress:
            report = export.write(output, on_progress)
    tell_notes(report.plan)
    merged = f", {report.n_modules} modules changed by the adapter" if adapter else ""
    parts = f"{report.paths[0]} and {len(report.paths) - 1} more parts" if len(report.paths) > 1 else str(output)
    typer.echo(f"{parts}: {summary(report.plan.specs)}, {size(report.n_bytes)}{merged}")


def ollama(
    model: Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", show_default=False, help="The folder to write.")
    ],
    adapter: Adapter = None,
    type_: Type = "Q4_K_M",
    importance: Importance = None,
    force: Force = False,
) -> None:
    """Write a folder for ollama create: GGUF file, and Modelfile with template, stop tokens and parameters.

    Example: veneer export ollama smollm2-135m-instruct --adapter runs/a/adapter -o ollama
    """
    from veneer.cli.loading import quiet, split_one
    from veneer.export.gguf.model import GgufOptions
    from veneer.export.gguf.modelfile import MODELFILE, export_ollama

    require_folder("--output", output)
    base, adapter = split_one(model, adapter)
    _require_adapter(adapter)
    options = GgufOptions(type=type_, overwrite=force, importance=importance)
    with quiet(), progress_bar("exporting") as on_progress:
        report = export_ollama(base, output, options, adapter=adapter, on_progress=on_progress)
    tell_notes(report.gguf.plan)
    typer.echo(f"{output}: {summary(report.gguf.plan.specs)}, {size(report.gguf.n_bytes)}")
    if not report.has_template:
        reason = "the chat template is none of texts around messages, so that TEMPLATE was left out"
        typer.echo(f"note: {reason}; Ollama then uses the one in the file where it knows it", err=True)
    typer.echo(f"next: ollama create {output.name} -f {output / MODELFILE}", err=True)


def lora(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", show_default=False, help="The folder of an adapter.")],
    output: Output,
    base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", show_default=False, help="Its base; by default the one that it names."),
    ] = None,
    type_: Annotated[str, typer.Option("--type", "-t", metavar="NAME", help="F32 or F16.")] = "F32",
    force: Force = False,
) -> None:
    """Write an adapter as a GGUF file that llama.cpp puts on the base's own file (llama-server --lora FILE).

    What the format cannot hold (DoRA, IA3, whole modules) is refused: merge it with veneer export gguf.

    Example: veneer export lora runs/a/adapter -o a-lora.gguf
    """
    from veneer.cli.loading import quiet
    from veneer.export.gguf.adapter import export_lora

    require_file("--output", output, ".gguf")
    _require_adapter(adapter)
    with quiet():
        report = export_lora(adapter, output, base=base, type=type_, overwrite=force)
    typer.echo(f"{output}: {report.n_modules} modules, {size(report.n_bytes)}")
    typer.echo("note: Ollama takes no adapters since 0.34.1; give it a merged file (veneer export gguf)", err=True)


def importance(
    model: Model,
    data: Annotated[
        Path, typer.Option("--data", "-d", metavar="FILE", show_default=False, help="A text like what it will read.")
    ],
    output: Output,
    adapter: Adapter = None,
    chunk_size: Annotated[int, typer.Option(metavar="N", min=16, help="Window in tokens.")] = 512,
    chunks: Annotated[
        int | None, typer.Option(metavar="N", min=1, show_default=False, help="Windows to read; all by default.")
    ] = None,
    force: Force = False,
) -> None:
    """Collect an importance matrix: how much each input of each matrix matters on a text, for types below 4 bits.

    Example: veneer export importance smollm2-135m-instruct -d text.txt -o imatrix.gguf
    """
    from veneer.cli.loading import load, quiet
    from veneer.export.gguf.collect import CollectOptions, collect_importance

    require_file("--output", output, ".gguf")
    options = CollectOptions(chunk_size=chunk_size, n_chunks=chunks, overwrite=force)
    loaded = load(model, adapter)
    with quiet(), progress_bar("collecting") as on_progress:
        n_windows = collect_importance(loaded.model, loaded.tokenizer, data, output, options, on_progress)
    typer.echo(f"{output}: {n_windows} windows of {chunk_size} tokens")


def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", show_default=False, help="A .gguf file, or its first part.")],
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", show_default=False, help="What it was made of, to compare with.")
    ] = None,
    adapter: Adapter = None,
) -> None:
    """Read a GGUF file whole: values, vocabulary, chat; beside its model also tokens and a greedy answer.

    Example: veneer export check a.gguf --model smollm2-135m-instruct
    """
    from veneer.cli.loading import load, quiet
    from veneer.export.gguf.check import check_file, compare_answers

    if not file.is_file():
        raise ConfigError(f"no file {str(file)!r}")
    if model is None and adapter is not None:
        raise ConfigError("--adapter goes with --model, the base that the file was made of")
    with quiet(), progress_bar("reading") as on_progress:
        report = check_file(file, on_progress)
        facts, problems = dict(report.facts), list(report.problems)
    if model is not None:
        ours, theirs = load(str(file), dtype="float32"), load(model, adapter, dtype="float32")
        compared = compare_answers(ours.model, theirs.model, (ours.tokenizer, theirs.tokenizer))
        facts, problems = facts | compared.facts, [*problems, *compared.problems]
    print_facts(facts)
    if problems:
        raise FormatError(f"{file} is not as it should be: {'; '.join(problems)}")


def _require_adapter(adapter: Path | None) -> None:
    if adapter is not None and not adapter.is_dir():
        raise ConfigError(f"no adapter {str(adapter)!r}: there is no such folder")


def _by_name(given: list[str]) -> list[tuple[str, str]]:
    """The pairs of ``--tensor-type``. Raises ConfigError for one without its equals sign."""
    wrong = [each for each in given if not all(each.rpartition("=")[::2])]
    if wrong:
        raise ConfigError(f"--tensor-type {wrong[0]!r} must be REGEX=TYPE, such as 'ffn_down=Q6_K'")
    return [(pattern, kind) for pattern, _, kind in (each.rpartition("=") for each in given)]


def _bytes(given: str | None) -> int | None:
    """The bytes of ``4G`` or ``500M``. Raises ConfigError for anything else."""
    if given is None:
        return None
    number, unit = given[:-1], given[-1:].upper()
    if not number.isdigit() or unit not in ("M", "G") or int(number) == 0:
        raise ConfigError(f"--split-size {given!r} must be a whole number of M or G, such as 4G")
    return int(number) * (10**6 if unit == "M" else 10**9)


app = typer.Typer(cls=ExportGroup, no_args_is_help=True, rich_markup_mode="rich")
app.command("gguf", cls=VerbCommand)(gguf)
app.command("ollama", cls=VerbCommand)(ollama)
app.command("lora", cls=VerbCommand)(lora)
app.command("check", cls=VerbCommand)(check)
app.command("importance", cls=VerbCommand)(importance)


@app.callback()
def export() -> None:
    """Write models and adapters in the formats of other programs.

    Example: veneer export gguf smollm2-135m-instruct --adapter runs/a/adapter -o a.gguf
    """
