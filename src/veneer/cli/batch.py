"""A file of prompts answered into another file: ``veneer generate --input FILE -o FILE``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.cli import loading
from veneer.cli.arguments import require_file
from veneer.disk.atomic import write_atomically
from veneer.errors import ConfigError, DataError

ADAPTER, ANSWER = "adapter", "answer"  # the fields that a row may have, and gets
Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """The way from rows to prompts: ``prompt`` is a template over their fields."""

    prompt: str | None
    system: str | None
    raw: bool


@dataclass(frozen=True)
class Asked:
    """A row with its prompt, and the adapter that is to answer it (None: the base alone)."""

    row: Row
    ids: Sequence[int]
    adapter: Path | None


def require_places(source: Path, output: Path | None, force: bool) -> Path:
    """The file to write. Raises ConfigError where it cannot be written, or holds what nobody asked to replace."""
    if output is None:
        raise ConfigError("--input FILE is answered into a file: add --output FILE.jsonl")
    require_file("--output", output, ".jsonl")
    if output.exists() and (output.samefile(source) if source.exists() else False):
        raise ConfigError(f"--output {output} is the input: choose another file")
    if output.exists() and not force:
        raise ConfigError(f"--output {output} exists: choose another file, or replace it with --force")
    return output


def adapters_of(rows: Sequence[Row], source: Path, default: Path | None) -> list[Path | None]:
    """The adapter of each row: that of its field ``adapter`` (empty: none), else the command's own.

    A folder is looked for beside the file, and then where the command is typed. Raises DataError that names the row.
    """
    found: list[Path | None] = []
    for number, row in enumerate(rows, 1):
        named = row.get(ADAPTER, default)
        if named is not None and not isinstance(named, (str, Path)):
            raise DataError(f"{source}: row {number}: the field {ADAPTER!r} must name a folder, not {named!r:.60}")
        if not named or isinstance(named, Path):
            found.append(named or None)
            continue
        beside = source.parent / named
        folder = beside if beside.is_dir() else Path(named).expanduser()
        if not folder.is_dir():
            raise DataError(f"{source}: row {number}: no adapter {named!r}: there is no such folder")
        found.append(folder)
    return found


def asked_of(
    rows: Sequence[Row], adapters: Sequence[Path | None], tokenizer: Any, options: BatchOptions, source: Path
) -> list[Asked]:
    """The prompts of the rows as token ids. Raises DataError that names the row, ConfigError for options."""
    found = []
    for number, (row, adapter) in enumerate(zip(rows, adapters, strict=True), 1):
        try:
            found.append(Asked(row, _ids(row, tokenizer, options), adapter))
        except DataError as error:
            raise DataError(f"{source}: row {number}: {error}") from error
    return found


def _ids(row: Row, tokenizer: Any, options: BatchOptions) -> list[int]:
    from veneer.cli.answering import encode_prompt
    from veneer.data.chat import render
    from veneer.data.rows import RowReader
    from veneer.data.templates import fill_template

    turns = row.get("messages") if options.prompt is None else None
    if turns is None:
        text = row.get("prompt") if options.prompt is None else fill_template(options.prompt, row)
        if isinstance(text, list):
            turns = text
        elif not isinstance(text, str) or not text:
            raise DataError(
                f"it has the fields {sorted(row)}; needed is a prompt, messages, or a template over the fields "
                "(--prompt 'Question: {question}')"
            )
        else:
            return encode_prompt(tokenizer, text, system=options.system, raw=options.raw)
    read = RowReader(system=options.system).read({"messages": turns}, "messages")["messages"]
    if read[-1]["role"] == "assistant":
        read = read[:-1]  # the answer that is known
    if not read:
        raise DataError("no turn asks for an answer")
    return render(tokenizer, read, {"add_generation_prompt": True})


def write_answers(output: Path, asked: Sequence[Asked], answers: Sequence[str]) -> None:
    """Write the rows, each with its ``answer``; the file appears when it is whole."""
    lines = [
        json.dumps({**each.row, ANSWER: answer}, ensure_ascii=False)
        for each, answer in zip(asked, answers, strict=True)
    ]
    write_atomically(output, "".join(f"{line}\n" for line in lines).encode())


def read_asked(
    source: Path, model: str, default: Path | None, options: BatchOptions, limit: int | None, **how: Any
) -> tuple[loading.Chosen, list[Asked]]:
    """The prompts of a file, and the model with all adapters that they name; nothing is loaded yet.

    ``how`` are the keywords of `loading.choose`. Raises DataError that names the row.
    """
    from veneer.evaluate.questions import read_prompts

    rows = read_prompts(source)[:limit]
    base, default = loading.split_one(model, default)
    adapters = adapters_of(rows, source, default)
    chosen = loading.choose(base, list(dict.fromkeys(each for each in adapters if each is not None)), **how)
    return chosen, asked_of(rows, adapters, chosen.tokenizer, options, source)
