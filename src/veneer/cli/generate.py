"""Implementation of ``veneer generate``."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from veneer.adapters.chosen import Chosen
from veneer.answer.answerer import Drawing
from veneer.answer.files import PromptRow, read_asked, write_answers
from veneer.answer.prompts import PromptRows, encode_prompt
from veneer.cli import loading
from veneer.cli.pages.generate import GenerateArguments
from veneer.errors import ConfigError
from veneer.evaluate.scoring import Answering
from veneer.plain.progress import progress_bar
from veneer.store.bars import quiet


def generate(args: GenerateArguments) -> None:
    """Answer a prompt on stdout, or a file of prompts into another file."""
    drawing = Drawing(temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, seed=args.seed)
    if args.input_ is not None and args.output is not None:
        reader = PromptRows(prompt=args.prompt, system=args.system, raw=args.raw)
        chosen, asked = read_asked(
            args.input_, args.model, args.adapter, reader, args.limit, four_bit=args.load_in_4bit, dtype=args.dtype
        )
        _answer_all(loading.told(chosen), asked, args.output, drawing, args.batch_size, args.max_new_tokens)
        return
    chosen = loading.choose(
        args.model, loading.adapter_list(args.adapter), four_bit=args.load_in_4bit, dtype=args.dtype
    )
    text = sys.stdin.read() if args.prompt == "-" else args.prompt or ""
    ids = encode_prompt(chosen.tokenizer, text, system=args.system, raw=args.raw)
    if not ids:
        raise ConfigError("the prompt is empty: give at least one token")
    answerer = loading.answerer_of(loading.loaded(chosen, encodes=True), drawing)
    answer = answerer.stream(ids, args.max_new_tokens)
    if not answer.strip() and not args.raw and answerer.tokenizer.chat_template is not None:
        typer.echo(
            "the answer is empty; the prompt was asked as a chat turn: for a model trained on plain prompts use --raw",
            err=True,
        )


def _answer_all(
    chosen: Chosen, asked: list[PromptRow], output: Path, drawing: Drawing, batch_size: int, max_new_tokens: int
) -> None:
    answerer = loading.answerer_of(loading.loaded(chosen, encodes=True), drawing, batch_size)
    folders = [each.adapter for each in asked] if chosen.adapters else []
    with quiet(), progress_bar("answering") as on_progress:
        prompts, answering = [each.ids for each in asked], Answering(max_new_tokens=max_new_tokens)
        answers = answerer.answers(prompts, answering, on_progress, folders)
    write_answers(output, asked, answers)
    n = len(chosen.adapters)
    by = f" by {n} adapters" if n > 1 else ""
    typer.echo(f"{output}: {len(answers):,} answers{by}")
