"""Rows of data from a file or the hub, as data sets in one of the forms for training."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetNotFoundError

from veneer.data.files import Row, numbered_rows, raise_all
from veneer.data.named_files import names_a_file
from veneer.data.preference import PreferenceReader
from veneer.data.reader import RowReader, form_in, form_of, read_rows
from veneer.data.unused import tell_unused
from veneer.errors import DataError

log = logging.getLogger(__name__)


def load_rows(source: str | Path, reader: RowReader | PreferenceReader, limit: int | None = None) -> Dataset:
    """Load all rows of a source (or the first ``limit``).

    ``source``: a .jsonl, .json (a list of objects) or .parquet file, or a hub id, ``name`` or ``name:split``. Raises
    DataError that lists the unusable rows by number, counted from one.
    """
    problems: list[str] = []
    read = read_rows(source, _numbered(source, problems), problems, reader, limit)
    tell_unused(str(source), reader.unread(read.columns, read.form), _advice(read.form))
    if isinstance(reader, RowReader) and reader.system is not None:
        first = [row["messages"][0]["content"] for row in read.rows if "messages" in row]
        if others := sum(content != reader.system for content in first):
            log.warning(
                "%s: %d of %d rows have a system message of their own, which is kept in place of the one given",
                source, others, len(first),
            )  # fmt: skip
    keys = dict.fromkeys(key for row in read.rows for key in row)  # Dataset reads those of the first row alone
    return Dataset.from_list([{key: row.get(key) for key in keys} for row in read.rows])


def _advice(form: str) -> str:
    """Return the advice that ends the warning about unused columns."""
    if form != "text":
        return ""
    return ". The rows are plain text (the column text); data.prompt and data.completion name other columns"


def stream_rows(source: str | Path, reader: RowReader) -> IterableDataset:
    """Yield the rows of `load_rows` one by one, for sets larger than memory. Raises DataError at the first unusable
    row.

    Rows come in the order of the source, which is read again for each epoch. Raises DataError if it has none.
    """
    streamed = IterableDataset.from_generator(_read_one_by_one, gen_kwargs={"source": str(source), "reader": reader})
    if next(iter(streamed), None) is None:
        raise DataError(f"{source} holds no rows: give at least one")
    _, first = next(_numbered(source, [], streaming=True))
    form = form_in(source, reader, first)
    tell_unused(str(source), reader.unread(first, form), _advice(form))
    return streamed


def _read_one_by_one(source: str, reader: RowReader) -> Iterator[Row]:
    problems: list[str] = []
    rows = _numbered(source, problems, streaming=True)
    form = final = None
    for number, row in rows:
        raise_all(source, problems)
        form = form or form_in(source, reader, row)
        try:
            read = reader.read(row, form)
        except DataError as error:
            raise DataError(f"{source}: row {number}: {error}") from error
        final = final or form_of(read)
        if form_of(read) != final:
            raise DataError(
                f"{source}: row {number} is of the form {form_of(read)}, and those before it {final}: bring all rows "
                "into one form"
            )
        yield read
    raise_all(source, problems)


def split_off(rows: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Return training rows and a random ``fraction`` of held-out rows, chosen by ``seed``. Raises DataError if one of
    the two would be empty.
    """
    n_held_out = round(fraction * len(rows))
    if not 0 < n_held_out < len(rows):
        raise DataError(
            f"a fraction of {fraction} of {len(rows)} rows leaves no rows to train on, or none to evaluate on: choose "
            "another, or give more rows"
        )
    parts = rows.train_test_split(test_size=n_held_out, seed=seed)
    return parts["train"], parts["test"]


def _numbered(
    source: str | Path, problems: list[str], *, streaming: bool = False
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    path = Path(source)
    if names_a_file(source):
        yield from numbered_rows(path, problems)
    else:
        yield from enumerate(_from_hub(str(source), streaming), start=1)


def _from_hub(source: str, streaming: bool) -> Iterable[Row]:
    name, _, split = source.partition(":")
    try:
        return cast("Iterable[Row]", load_dataset(name, split=split or "train", streaming=streaming))
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError, ValueError) as error:
        raise DataError(
            f"{source!r} is no file, and no data set of that name could be loaded from the hub ({error}). Give a "
            "file, or a data set's name"
        ) from error
