"""``veneer generate``: one answer, or a file of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from veneer.cli import loading
from veneer.core.progress import progress_bar
from veneer.errors import ConfigError

if TYPE_CHECKING:
    from veneer.cli.answerer import Drawing
    from veneer.cli.batch import Asked

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


def generate(
    model: loading.Model,
    prompt: _Prompt = None,
    input_: _Input = None,
    output: _Output = None,
    adapter: loading.Adapter = None,
    system: loading.System = None,
    raw: _Raw = False,
    limit: _Limit = None,
    batch_size: _BatchSize = 16,
    force: _Force = False,
    max_new_tokens: loading.MaxNewTokens = 256,
    temperature: loading.Temperature = 0.0,
    top_p: loading.TopP = 1.0,
    top_k: loading.TopK = 0,
    seed: loading.Seed = None,
    load_in_4bit: loading.FourBit = False,
    dtype: loading.Dtype = "auto",
) -> None:
    """Answer one prompt, word by word, on stdout, or a file of prompts into another file, each by its own adapter.

    A model with a chat template is asked in a chat turn, see --raw.

    Example: veneer generate smollm2-135m-instruct -p "Why is the sky blue?"
    """
    from veneer.cli.answerer import Drawing

    drawing = Drawing(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    if input_ is not None:
        from veneer.cli.batch import BatchOptions, read_asked, require_places

        target = require_places(input_, output, force)
        options = BatchOptions(prompt=prompt, system=system, raw=raw)
        chosen, asked = read_asked(input_, model, adapter, options, limit, four_bit=load_in_4bit, dtype=dtype)
        _answer_all(chosen, asked, target, drawing, batch_size, max_new_tokens)
        return
    if prompt is None:
        raise ConfigError("say what to answer: --prompt TEXT, or --input FILE with --output FILE")
    if output is not None or force or limit is not None:
        raise ConfigError("--output, --limit and --force belong to --input FILE: one answer goes to stdout")
    chosen = loading.choose(model, loading.adapter_list(adapter), four_bit=load_in_4bit, dtype=dtype)
    _answer_one(chosen, sys.stdin.read() if prompt == "-" else prompt, system, raw, drawing, max_new_tokens)


def _answer_one(
    chosen: loading.Chosen, text: str, system: str | None, raw: bool, drawing: Drawing, max_new_tokens: int
) -> None:
    from veneer.cli.answering import answerer_of, encode_prompt

    ids = encode_prompt(chosen.tokenizer, text, system=system, raw=raw)
    if not ids:
        raise ConfigError("the prompt is empty: nothing to continue")
    answerer = answerer_of(chosen.load(), drawing)
    answer = answerer.stream(ids, max_new_tokens)
    if not answer.strip() and not raw and answerer.tokenizer.chat_template is not None:
        typer.echo(
            "the answer is empty; the prompt was asked as a chat turn: for a model trained on plain prompts use --raw",
            err=True,
        )


def _answer_all(
    chosen: loading.Chosen, asked: list[Asked], output: Path, drawing: Drawing, batch_size: int, max_new_tokens: int
) -> None:
    from veneer.cli.answering import answerer_of
    from veneer.cli.batch import write_answers
    from veneer.evaluate.scoring import Answering

    answerer = answerer_of(chosen.load(), drawing, batch_size)
    folders = [each.adapter for each in asked] if chosen.adapters else []
    with loading.quiet(), progress_bar("answering") as on_progress:
        prompts, answering = [each.ids for each in asked], Answering(max_new_tokens=max_new_tokens)
        answers = answerer.answers(prompts, answering, on_progress, folders)
    write_answers(output, asked, answers)
    n = len(chosen.adapters)
    by = f" by {n} adapters" if n > 1 else ""
    typer.echo(f"{output}: {len(answers):,} answers{by}")
