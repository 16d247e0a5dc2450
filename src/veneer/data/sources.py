"""Joins several sources of rows into one set. Each has its own reader and weight."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from datasets import Dataset

from veneer.data.reader import RowReader, form_of
from veneer.data.rows import load_rows
from veneer.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class Source:
    """File or hub data set, its reader, and the number of rows taken from it.

    ``weight``: how often each row is taken. 0.5 takes half of the rows, and 2.5 takes all twice and half of them once
    more. ``count``: the number of rows to take instead; if there are fewer, rows are repeated. The seed decides which
    rows are left out. Raises ConfigError for numbers that are not positive, and if both are set.
    """

    name: str
    reader: RowReader
    weight: float = 1.0
    count: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ConfigError(f"{self.name}: weight={self.weight!r} must be above 0; leave the source out for 0")
        if self.count is not None and self.count < 1:
            raise ConfigError(f"{self.name}: count={self.count!r} must be at least 1; leave the source out for 0")
        if self.count is not None and self.weight != 1:
            raise ConfigError(f"{self.name}: give weight or count, not both")

    def n_taken(self, n_rows: int) -> int:
        """Return how many rows are taken from a source of ``n_rows``. Raises DataError if it is zero."""
        n = round(self.weight * n_rows) if self.count is None else self.count
        if not n:
            raise DataError(f"{self.name}: a weight of {self.weight:g} takes none of {n_rows} rows: raise it")
        return n


def load_sources(sources: Sequence[Source], seed: int, limit: int | None = None) -> Dataset:
    """Return the rows of all sources (of each the first ``limit``) by their weights, one source after another.

    Raises DataError as `load_rows` does, and if sources hold rows of two forms.
    """
    parts = [load_rows(source.name, source.reader, limit) for source in sources]
    forms = [form_of(part[0]) for part in parts]
    for source, form in zip(sources, forms, strict=True):
        if form != forms[0]:
            raise DataError(
                f"{source.name} holds rows of the form {form}, and {sources[0].name} of the form {forms[0]}: bring "
                "them into one form (chat: true makes conversations of prompts and completions)"
            )
    taken = [_taken(part, source, seed + at) for at, (source, part) in enumerate(zip(sources, parts, strict=True))]
    if len(taken) == 1:
        return taken[0]
    columns = dict.fromkeys(name for part in taken for name in part.column_names)
    rows = [{name: row.get(name) for name in columns} for part in taken for row in part]
    return Dataset.from_list(rows)


def _taken(rows: Dataset, source: Source, seed: int) -> Dataset:
    n = source.n_taken(len(rows))
    if n == len(rows):
        return rows
    whole, rest = divmod(n, len(rows))
    drawn = sorted(random.Random(seed).sample(range(len(rows)), rest))
    return rows.select([*(i for _ in range(whole) for i in range(len(rows))), *drawn])
