"""``veneer export``: models and adapters in the formats of other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from veneer.cli.arguments import require_file, require_folder
from veneer.cli.help import VerbCommand, first_sentence, print_page
from veneer.cli.pages.options import Adapter, Model
from veneer.cli.work import carried_out_by
from veneer.errors import ConfigError

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
    """Group of export formats, each a verb."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the page of the group: every format with its first sentence."""
        print_page(self, ctx, [(name, first_sentence(verb)) for name, verb in self.commands.items()])

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the pieces of the usage line, ``FORMAT …``."""
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


@carried_out_by("veneer.cli.export")
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
    """Write a model as a GGUF file for llama.cpp, Ollama and LM Studio: merged, converted and quantized in one step.

    Example: veneer export gguf smollm2-135m-instruct --adapter runs/a/adapter -o a.gguf
    """
    require_file("--output", output, ".gguf")
    _require_adapter(adapter)


@carried_out_by("veneer.cli.export")
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
    require_folder("--output", output)
    _require_adapter(adapter)


@carried_out_by("veneer.cli.export")
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
    """Write an adapter as a GGUF file, which llama.cpp loads with the base's own file (llama-server --lora FILE).

    Adapters that the format cannot hold (DoRA, IA3, whole modules) are refused: merge them with veneer export gguf.

    Example: veneer export lora runs/a/adapter -o a-lora.gguf
    """
    require_file("--output", output, ".gguf")
    _require_adapter(adapter)


@carried_out_by("veneer.cli.export")
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
    require_file("--output", output, ".gguf")


@carried_out_by("veneer.cli.export")
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", show_default=False, help="A .gguf file, or its first part.")],
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", show_default=False, help="What it was made of, to compare with.")
    ] = None,
    adapter: Adapter = None,
) -> None:
    """Check a whole GGUF file: values, vocabulary, chat. With --model, compare tokens and a greedy answer too.

    Example: veneer export check a.gguf --model smollm2-135m-instruct
    """
    if not file.is_file():
        raise ConfigError(f"no file {str(file)!r}")
    if model is None and adapter is not None:
        raise ConfigError("--adapter goes with --model, the base that the file was made of")


def _require_adapter(adapter: Path | None) -> None:
    if adapter is not None and not adapter.is_dir():
        raise ConfigError(f"no adapter {str(adapter)!r}: there is no such folder")


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
