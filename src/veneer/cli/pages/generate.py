"""``veneer generate``: one answer, or a file of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.arguments import require_file, require_model, require_rows
from veneer.cli.pages import options
from veneer.cli.pages.options import unset
from veneer.cli.work import verb
from veneer.errors import ConfigError
from veneer.store.adapter.folder import require_adapter, require_whole

_Prompt = Annotated[
    str | None,
    unset(
        "TEXT",
        "The prompt; - reads stdin. With --input: a template over a row's fields, 'Question: {question}'.",
        "--prompt",
        "-p",
    ),
]
_Input = Annotated[
    Path | None,
    unset(
        "FILE",
        "Answer each row of a file (prompt or messages; .txt: each line). A field adapter names the row's own.",
        "--input",
        "-i",
    ),
]
_Raw = Annotated[
    bool,
    typer.Option(
        "--raw", help="Continue the prompt as plain text: for a model trained on plain prompts (data.chat: false)."
    ),
]


@dataclass(frozen=True, kw_only=True)
class GenerateArguments:
    """Answer one prompt, word by word, on stdout, or a file of prompts into another file, each by its own adapter.

    A model with a chat template receives the prompt as a chat turn; see --raw.

    Example: veneer generate smollm2-135m-instruct -p "Why is the sky blue?"
    """

    model: options.Model
    prompt: _Prompt = None
    input_: _Input = None
    output: Annotated[Path | None, unset("FILE", "With --input: the .jsonl to write.", "--output", "-o")] = None
    adapter: options.Adapter = None
    system: options.System = None
    raw: _Raw = False
    limit: Annotated[int | None, unset("N", "With --input: only the first so many rows.", min=1)] = None
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="With --input: most rows answered at once.")] = 16
    force: Annotated[bool, typer.Option("--force", help="With --input: replace the output.")] = False
    max_new_tokens: options.MaxNewTokens = 256
    temperature: options.Temperature = 0.0
    top_p: options.TopP = 1.0
    top_k: options.TopK = 0
    seed: options.Seed = None
    load_in_4bit: options.FourBit = False
    dtype: options.Dtype = "auto"

    def __post_init__(self) -> None:
        if self.input_ is None and self.prompt is None:
            raise ConfigError("say what to answer: --prompt TEXT, or --input FILE with --output FILE")
        if self.input_ is None and (self.output is not None or self.force or self.limit is not None):
            raise ConfigError("--output, --limit and --force belong to --input FILE: one answer goes to stdout")
        if self.input_ is not None and self.output is None:
            raise ConfigError("--input FILE is answered into a file: add --output FILE.jsonl")
        if self.input_ is not None and self.output is not None:
            _require_places(self.input_, self.output, self.force)
        require_adapter(self.adapter)
        require_rows(self.input_)
        require_model(self.model)
        require_whole(self.adapter)


def _require_places(source: Path, output: Path, force: bool) -> None:
    """Raise ConfigError if the output cannot be written, or exists and may not be replaced."""
    if output.exists() and source.exists() and output.samefile(source):
        raise ConfigError(f"--output {output} is the input: choose another file")
    require_file("--output", output, ".jsonl", replaces=force)


generate = verb(GenerateArguments, "veneer.cli.generate", "generate")
