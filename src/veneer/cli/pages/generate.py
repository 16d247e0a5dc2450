"""``veneer generate``: one answer, or a file of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.pages import options
from veneer.cli.work import carried_out_by
from veneer.errors import ConfigError
from veneer.plan.presets import require_weights

_Prompt = Annotated[
    str | None,
    typer.Option(
        "--prompt",
        "-p",
        metavar="TEXT",
        show_default=False,
        help="The prompt; - reads stdin. With --input: a template over a row's fields, 'Question: {question}'.",
    ),
]
_Input = Annotated[
    Path | None,
    typer.Option(
        "--input",
        "-i",
        metavar="FILE",
        show_default=False,
        help="Answer each row of a file (prompt or messages; .txt: each line). A field adapter names the row's own.",
    ),
]
_Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", show_default=False, help="With --input: the .jsonl to write."),
]
_Force = Annotated[bool, typer.Option("--force", help="With --input: replace the output.")]
_Limit = Annotated[
    int | None, typer.Option(metavar="N", min=1, show_default=False, help="With --input: only the first so many rows.")
]
_BatchSize = Annotated[int, typer.Option(metavar="N", min=1, help="With --input: most rows answered at once.")]
_Raw = Annotated[
    bool,
    typer.Option(
        "--raw", help="Continue the prompt as plain text: for a model trained on plain prompts (data.chat: false)."
    ),
]


@carried_out_by("veneer.cli.generate")
def generate(
    model: options.Model,
    prompt: _Prompt = None,
    input_: _Input = None,
    output: _Output = None,
    adapter: options.Adapter = None,
    system: options.System = None,
    raw: _Raw = False,
    limit: _Limit = None,
    batch_size: _BatchSize = 16,
    force: _Force = False,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    seed: options.Seed = None,
    load_in_4bit: options.FourBit = False,
    dtype: options.Dtype = "auto",
) -> None:
    """Answer one prompt, word by word, on stdout, or a file of prompts into another file, each by its own adapter.

    A model with a chat template receives the prompt as a chat turn; see --raw.

    Example: veneer generate smollm2-135m-instruct -p "Why is the sky blue?"
    """
    if input_ is None and prompt is None:
        raise ConfigError("say what to answer: --prompt TEXT, or --input FILE with --output FILE")
    if input_ is None and (output is not None or force or limit is not None):
        raise ConfigError("--output, --limit and --force belong to --input FILE: one answer goes to stdout")
    if input_ is not None and output is None:
        raise ConfigError("--input FILE is answered into a file: add --output FILE.jsonl")
    require_weights(model)
