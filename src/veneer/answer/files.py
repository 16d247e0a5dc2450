"""Answers files of prompts into other files. Each row may name an adapter, which answers it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.adapters.chosen import Chosen, choose, split_one
from veneer.answer.prompts import PromptRows, Row
from veneer.data.asked_rows import read_prompts
from veneer.disk.atomic import write_atomically
from veneer.errors import ConfigError, DataError
from veneer.store.adapter.folder import require_adapter

ADAPTER, ANSWER = "adapter", "answer"  # the fields that a row may have, and gets


@dataclass(frozen=True)
class PromptRow:
    """Row with its prompt as token ids, and the folder of the adapter that answers it; None means the base alone."""

    row: Row
    ids: Sequence[int]
    adapter: Path | None


def read_asked(
    source: Path, model: str, default: Path | None, reader: PromptRows, limit: int | None, **how: Any
) -> tuple[Chosen, list[PromptRow]]:
    """Return the prompts of a file, and the model with all adapters that they name; nothing is loaded yet.

    ``default`` is the adapter of rows that name none; ``how`` are the keywords of `choose`. Raises DataError that names
    the row, and the errors of `choose`.
    """
    rows = read_prompts(source)[:limit]
    base, default = split_one(model, default)
    adapters = adapters_of(rows, source, default)
    chosen = choose(base, list(dict.fromkeys(each for each in adapters if each is not None)), **how)
    return chosen, asked_of(rows, adapters, chosen.tokenizer, reader, source)


def adapters_of(rows: Sequence[Row], source: Path, default: Path | None) -> list[Path | None]:
    """Return the adapter of each row: its field ``adapter``, or ``default`` if the row has no such field. An empty
    field means no adapter.

    A folder is searched for next to the file, then in the working directory. Raises DataError that names the row.
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
        try:
            require_adapter(folder)
        except ConfigError as error:
            raise DataError(f"{source}: row {number}: {error}") from error
        found.append(folder)
    return found


def asked_of(
    rows: Sequence[Row], adapters: Sequence[Path | None], tokenizer: Any, reader: PromptRows, source: Path
) -> list[PromptRow]:
    """Return the prompts of the rows as token ids. Raises DataError that names the row, ConfigError for settings."""
    found = []
    for number, (row, adapter) in enumerate(zip(rows, adapters, strict=True), 1):
        try:
            found.append(PromptRow(row, reader.read(row, tokenizer), adapter))
        except DataError as error:
            raise DataError(f"{source}: row {number}: {error}") from error
    return found


def write_answers(output: Path, asked: Sequence[PromptRow], answers: Sequence[str]) -> None:
    """Write the rows, each with its ``answer``. The file appears once it is complete."""
    lines = [
        json.dumps({**each.row, ANSWER: answer}, ensure_ascii=False)
        for each, answer in zip(asked, answers, strict=True)
    ]
    write_atomically(output, "".join(f"{line}\n" for line in lines).encode())
