"""Reads the rows that a recipe trains on and holds out."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import NamedTuple

from datasets import Dataset, IterableDataset

from veneer.data.encoding import Kind
from veneer.data.preference import PreferenceReader
from veneer.data.reader import RowReader
from veneer.data.rows import load_rows, split_off, stream_rows
from veneer.data.sources import load_sources
from veneer.recipe.parts import DataPart
from veneer.recipe.readers import readers_of, require_no_answers
from veneer.train.sources import sources_of

log = logging.getLogger(__name__)

_SHUFFLED = 10_000  # streamed rows that are held to draw from


@dataclass(frozen=True)
class Rows:
    """Training rows, and held-out rows if there are any."""

    train: Dataset | IterableDataset
    eval: Dataset | None


def read_data(part: DataPart, seed: int, reader: RowReader | PreferenceReader | None = None) -> Rows:
    """Return the rows that a recipe names. Raises DataError and ConfigError as `load_rows` and `split_off` do."""
    if reader is not None:
        train = load_rows(part.train, reader, part.limit)
    else:
        reader = readers_of(part)[0]
        if part.streaming:
            streamed = stream_rows(part.train, reader).shuffle(seed=seed, buffer_size=_SHUFFLED)
            return Rows(streamed, None if part.eval is None else load_rows(part.eval, reader, part.eval_limit))
        train = load_sources(sources_of(part), seed, part.limit)
    if part.eval is not None:
        return Rows(train, load_rows(part.eval, reader, part.eval_limit))
    return Rows(*split_off(train, part.eval_fraction, seed)) if part.eval_fraction else Rows(train, None)


class _Only(NamedTuple):
    """Tokens of rows that are trained: only completions, only the assistant's turns, or all if both are False."""

    completion: bool
    assistant: bool


def answers_only(part: DataPart, kind: Kind) -> _Only:
    """Return which tokens ``data.train_on`` trains for rows of a kind.

    Raises ConfigError if it asks for answers and the rows have none.
    """
    if part.train_on == "answers" and kind == "text":
        require_no_answers(part)
        log.warning("the rows are plain text, so every token is trained; data.train_on: everything says so")
    answers = part.train_on == "answers"
    return _Only(answers and kind == "prompt-completion", answers and kind == "messages")
