"""``veneer export``: models and adapters in the formats of other programs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from veneer.cli.arguments import require_file, require_folder, require_model, require_rows
from veneer.cli.help import VerbCommand, first_sentence, print_page
from veneer.cli.pages.export_as_lora import as_lora
from veneer.cli.pages.export_vllm import vllm
from veneer.cli.pages.options import Adapter, Force, Model, unset
from veneer.cli.work import verb
from veneer.errors import ConfigError
from veneer.export.gguf.mixes import adapter_mix_of, mix_of
from veneer.store.adapter.folder import require_adapter

Output = Annotated[Path, unset("FILE", "The .gguf file to write.", "--output", "-o")]
Type = Annotated[
    str, typer.Option("--type", "-t", metavar="NAME", help="F32, F16, BF16, Q8_0, Q4_K_M and so on; see docs/gguf.md.")
]


class ExportGroup(TyperGroup):
    """Group of export formats, each a verb."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the page of the group: every format with its first sentence."""
        print_page(self, ctx, [(name, first_sentence(verb)) for name, verb in self.commands.items()])

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the pieces of the usage line, ``FORMAT …``."""
        return ["FORMAT", "[ARGUMENTS]", "[OPTIONS]"]


TensorTypes = Annotated[list[str] | None, unset("REGEX=TYPE", "The type of tensors so named; may be repeated.")]
Importance = Annotated[Path | None, unset("FILE", "An importance matrix to quantize by.")]


@dataclass(frozen=True, kw_only=True)
class GgufArguments:
    """Write a model as a GGUF file for llama.cpp, Ollama and LM Studio: merged, converted and quantized in one step.

    Example: veneer export gguf smollm2-135m-instruct --adapter runs/a/adapter -o a.gguf
    """

    model: Model
    output: Output
    adapter: Adapter = None
    type_: Type = "Q4_K_M"
    dtype: Annotated[str | None, unset("NAME", "Round weights to this dtype first; by default the base's.")] = None
    name: Annotated[str | None, unset("TEXT", "The model's name in the file.")] = None
    tensor_type: TensorTypes = None
    output_type: Annotated[str | None, unset("TYPE", "The type of the head.")] = None
    embedding_type: Annotated[str | None, unset("TYPE", "The type of the embeddings.")] = None
    pure: Annotated[bool, typer.Option("--pure", help="Every matrix in the one type, without a mix.")] = False
    importance: Importance = None
    split_size: Annotated[str | None, unset("SIZE", "Split into parts of at most this size, such as 4G.")] = None
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print types and sizes; write nothing.")] = False
    force: Force = False

    def __post_init__(self) -> None:
        written = not self.dry_run and self.split_size is None  # parts of a split file have other names
        require_file("--output", self.output, ".gguf", replaces=self.force or not written)
        mix_of(self.type_)
        require_adapter(self.adapter)
        require_model(self.model)


gguf = verb(GgufArguments, "veneer.cli.export", "gguf")


@dataclass(frozen=True, kw_only=True)
class OllamaArguments:
    """Write a folder for ollama create: GGUF file, and Modelfile with template, stop tokens and parameters.

    Example: veneer export ollama smollm2-135m-instruct --adapter runs/a/adapter -o ollama
    """

    model: Model
    output: Annotated[Path, unset("FOLDER", "The folder to write.", "--output", "-o")]
    adapter: Adapter = None
    type_: Type = "Q4_K_M"
    importance: Importance = None
    force: Force = False

    def __post_init__(self) -> None:
        require_folder("--output", self.output, replaces=self.force)
        mix_of(self.type_)
        require_adapter(self.adapter)
        require_model(self.model)


ollama = verb(OllamaArguments, "veneer.cli.export", "ollama")


@dataclass(frozen=True, kw_only=True)
class LoraArguments:
    """Write an adapter as a GGUF file, which llama.cpp loads with the base's own file (llama-server --lora FILE).

    Adapters that the format cannot hold (DoRA, IA3, whole modules) are refused: merge them with veneer export gguf.

    Example: veneer export lora runs/a/adapter -o a-lora.gguf
    """

    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", show_default=False, help="The folder of an adapter.")]
    output: Output
    base: Annotated[
        str | None,
        unset("MODEL", "Its base; by default the one that it names."),
    ] = None
    type_: Annotated[str, typer.Option("--type", "-t", metavar="NAME", help="F32 or F16.")] = "F32"
    force: Force = False

    def __post_init__(self) -> None:
        require_file("--output", self.output, ".gguf", replaces=self.force)
        adapter_mix_of(self.type_)
        require_adapter(self.adapter)
        require_model(self.base)


lora = verb(LoraArguments, "veneer.cli.export", "lora")


@dataclass(frozen=True, kw_only=True)
class ImportanceArguments:
    """Collect an importance matrix: how much each input of each matrix matters on a text, for types below 4 bits.

    Example: veneer export importance smollm2-135m-instruct -d text.txt -o imatrix.gguf
    """

    model: Model
    data: Annotated[Path, unset("FILE", "A text like what it will read.", "--data", "-d")]
    output: Output
    adapter: Adapter = None
    chunk_size: Annotated[int, typer.Option(metavar="N", min=16, help="Window in tokens.")] = 512
    chunks: Annotated[int | None, unset("N", "Windows to read; all by default.", min=1)] = None
    force: Force = False

    def __post_init__(self) -> None:
        require_file("--output", self.output, ".gguf", replaces=self.force)
        require_adapter(self.adapter)
        require_rows(self.data)
        require_model(self.model)


importance = verb(ImportanceArguments, "veneer.cli.export", "importance")


@dataclass(frozen=True, kw_only=True)
class CheckArguments:
    """Check a whole GGUF file: values, vocabulary, chat. With --model, compare tokens and a greedy answer too.

    Example: veneer export check a.gguf --model smollm2-135m-instruct
    """

    file: Annotated[Path, typer.Argument(metavar="FILE", show_default=False, help="A .gguf file, or its first part.")]
    model: Annotated[str | None, unset("MODEL", "What it was made of, to compare with.")] = None
    adapter: Adapter = None

    def __post_init__(self) -> None:
        if not self.file.is_file():
            raise ConfigError(f"no file {str(self.file)!r}. Give a .gguf file")
        if self.model is None and self.adapter is not None:
            raise ConfigError("--adapter is given without --model: add --model, the base that the file was made of")
        require_adapter(self.adapter)
        require_model(self.model)


check = verb(CheckArguments, "veneer.cli.export", "check")


app = typer.Typer(cls=ExportGroup, no_args_is_help=True, rich_markup_mode="rich")
app.command("gguf", cls=VerbCommand)(gguf)
app.command("ollama", cls=VerbCommand)(ollama)
app.command("lora", cls=VerbCommand)(lora)
app.command("vllm", cls=VerbCommand)(vllm)
app.command("as-lora", cls=VerbCommand)(as_lora)
app.command("check", cls=VerbCommand)(check)
app.command("importance", cls=VerbCommand)(importance)


@app.callback()
def export() -> None:
    """Write models and adapters in the formats of other programs.

    Example: veneer export gguf smollm2-135m-instruct --adapter runs/a/adapter -o a.gguf
    """
