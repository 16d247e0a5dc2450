"""Lengths of a recipe's own rows, so that seconds are those of its batches and not of full ones."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError

from veneer.data.chat import with_template
from veneer.data.encoding import Encoder, kind_of
from veneer.data.files import numbered_rows
from veneer.data.named_files import names_a_file
from veneer.data.tasks import OF_REWARDS
from veneer.errors import VeneerError
from veneer.plan.presets import hub_id_of
from veneer.plan.step import Batch
from veneer.recipe.parts import DataPart
from veneer.recipe.readers import preference_reader
from veneer.recipe.recipe import Recipe
from veneer.recipe.tasks import OF_ANSWERS, Task
from veneer.store.source import load_tokenizer
from veneer.train.sources import sources_of

MOST_READ, MOST_ENCODED = 4000, 200
"""Rows from the front of a file, and those of them that are encoded, evenly spread."""


@dataclass(frozen=True, slots=True)
class OwnRows:
    """Average micro-batch of the recipe's rows, padding included, and the number of rows that were encoded.

    ``tokens``: the tokens of the micro-batch without padding. ``n_trained``: the rows of an epoch, None for a file of
    more than `MOST_READ` rows.
    """

    batch: Batch
    n_rows: int
    tokens: float
    n_trained: int | None = None


def own_rows(recipe: Recipe, full: Batch) -> OwnRows | None:
    """Return the average micro-batch of a recipe's own rows. ``full`` is one whose rows all have the maximal length.

    Return None if every micro-batch is full (packed rows), or if the rows cannot be read here, from a single file. A
    run reports the reason.
    """
    args, source = recipe.training_config(), recipe.model.source
    is_here = hub_id_of(source) is None
    if recipe.task != "sft" or full.packed or args.padding_free or recipe.data.more or not is_here:
        return None
    try:
        lengths, n_all = _lengths(recipe.data, source, full.length)
    except (VeneerError, OSError):
        return None
    if not lengths:
        return None
    grouped = args.train_sampling_strategy == "group_by_length"
    order = sorted(lengths) if grouped else random.Random(recipe.seed).sample(lengths, len(lengths))
    multiple = args.pad_to_multiple_of or 1
    batches = [order[start : start + full.n_rows] for start in range(0, len(order), full.n_rows)]
    widths = [-(-max(rows) // multiple) * multiple for rows in batches]
    tokens = sum(lengths) / len(lengths) * full.n_rows
    held_out = 0.0 if recipe.data.eval else recipe.data.eval_fraction or 0.0
    n_trained = None if n_all is None else n_all - round(n_all * held_out)
    return OwnRows(replace(full, length=round(sum(widths) / len(widths))), len(lengths), tokens, n_trained)


def filled(full: Batch, recipe: Recipe) -> Batch:
    """Return ``full`` with at most as many rows as the recipe's file of training rows has; packed rows are not counted.

    It is returned unchanged if the rows are in no file or in several, or if they cannot be read here.
    """
    data, most = recipe.data, recipe.training_config().per_device_train_batch_size
    if recipe.task in OF_REWARDS or full.packed or data.more or not _is_file(data):
        return full
    try:
        n_rows = sum(1 for _ in itertools.islice(numbered_rows(Path(data.train), []), min(data.limit or most, most)))
    except (VeneerError, OSError):
        return full
    return full.with_rows(full.n_rows // most * max(1, n_rows))


def prompt_lengths(task: Task, source: str, data: DataPart) -> Sequence[int]:
    """Return the number of tokens of each prompt, for at most `MOST_ENCODED` rows, by the tokenizer of the model
    ``source``.

    Return an empty sequence for tasks without prompts, or if the rows are in no file or cannot be read here. A run
    reports the reason.
    """
    if task not in ("dpo", *OF_REWARDS, "distill") or hub_id_of(source) is not None:
        return ()
    return _prompt_lengths(task, source, data.model_dump_json())


@lru_cache(maxsize=16)
def _prompt_lengths(task: Task, source: str, data: str) -> Sequence[int]:
    part = DataPart.model_validate_json(data)
    if not _is_file(part):
        return ()
    reader = sources_of(part)[0].reader if task in OF_ANSWERS else preference_reader(part, task)
    try:
        n = min(part.limit or MOST_READ, MOST_READ)
        rows = [row for _, row in itertools.islice(numbered_rows(Path(part.train), []), n)]
        tokenizer = with_template(load_tokenizer(source), part.chat_template)
        form = reader.form(list(rows[0])) if rows else ""
        read = [reader.read(row, form) for row in rows[:: -(-len(rows) // MOST_ENCODED) or 1]]
        return tuple(_n_tokens(tokenizer, prompt) for row in read if (prompt := _prompt_of(row)))
    except (VeneerError, OSError, TemplateError, ValueError, TypeError):
        return ()


def text_tokens(source: str, text: str) -> int:
    """Return the tokens of a text, by the model's own tokenizer if it is here; else a quarter of its characters."""
    if hub_id_of(source) is not None:
        return len(text) // 4
    return _n_tokens(load_tokenizer(source), text)


def _prompt_of(row: Mapping[str, Any]) -> Any:
    """Return a row's prompt as text or messages; None if the row has neither ``prompt`` nor ``messages``."""
    return row["prompt"] if "prompt" in row else row["messages"][:-1] if "messages" in row else None


def _n_tokens(tokenizer: Any, prompt: Any) -> int:
    if isinstance(prompt, str):
        return len(tokenizer(prompt)["input_ids"])
    return len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"])


def _is_file(part: DataPart) -> bool:
    return names_a_file(part.train) and Path(part.train).is_file()


def _lengths(part: DataPart, source: str, longest: int) -> tuple[list[int], int | None]:
    """Return the lengths of some encoded rows, at most ``longest``, and the number of all rows, or None if not all were
    read.

    ``source`` names the tokenizer. Rows that are in no local file give no lengths.
    """
    if not _is_file(part):
        return [], None
    rows = _read(part, min(part.limit or MOST_READ, MOST_READ))
    if not rows:
        return [], None
    tokenizer = with_template(load_tokenizer(source), part.chat_template)
    encoder = Encoder(tokenizer=tokenizer, kind=kind_of(list(rows[0]), "text"), max_length=longest)
    step = -(-len(rows) // MOST_ENCODED)
    lengths = [len(encoder(row, number)["input_ids"]) for number, row in enumerate(rows[::step])]
    return lengths, len(rows) if len(rows) < MOST_READ or len(rows) == part.limit else None


def _read(part: DataPart, most: int) -> Sequence[dict[str, Any]]:
    (source,) = sources_of(part)
    rows = [row for _, row in itertools.islice(numbered_rows(Path(source.name), []), most)]
    form = source.reader.form(rows[0]) if rows else ""
    return [source.reader.read(row, form) for row in rows]
