"""Data set prepared for training: encoded, rows without a trained token dropped, packed."""

from __future__ import annotations

import hashlib
import itertools
import logging
from array import array
from typing import Any, TypeVar, cast

import pyarrow.compute
from datasets import Dataset, IterableDataset, concatenate_datasets

from veneer.data.encoded_cache import encoded_once
from veneer.data.encoding import IGNORED, Encoder, Kind
from veneer.data.packing import pack
from veneer.data.task_column import TASK
from veneer.data.unused import tell_unused
from veneer.errors import ConfigError, DataError

log = logging.getLogger(__name__)
_COUNTED_AT_ONCE = 10_000  # rows
AnyDataset = TypeVar("AnyDataset", Dataset, IterableDataset)


def encode_all(dataset: AnyDataset, encoder: Encoder, name: str, n_processes: int | None = None) -> AnyDataset:
    """Encode every row. Rows without a trained token are dropped, and their number is logged.

    If no row is left, raises DataError, which says which tokens would have been trained.
    """
    if isinstance(dataset, Dataset) and not len(dataset):
        raise DataError(f"the {name} data has no rows: give at least one")
    columns = columns_of(dataset)
    tell_unused(f"the {name} data", encoder.unread(columns))
    if isinstance(dataset, IterableDataset):
        encoded = dataset.map(encoder, with_indices=True, remove_columns=columns)
        return encoded.filter(has_trained_token)

    def encode() -> Dataset:
        encoded = dataset.map(
            encoder, with_indices=True, remove_columns=columns, num_proc=n_processes, desc=f"Encoding {name}"
        )
        return encoded.filter(has_trained_token, num_proc=n_processes, desc=f"Checking {name}")

    kept = encoded_once(dataset, encoder, encode)
    if not len(kept):
        raise DataError(_all_masked(encoder, name, columns, len(dataset)))
    if len(kept) < len(dataset):
        log.warning(
            "%s data: %d of %d rows hold no trained token (cut off by max_length=%s, or empty) and are left out",
            name, len(dataset) - len(kept), len(dataset), encoder.max_length,
        )  # fmt: skip
    _tell_full(kept, encoder, name)
    return kept


def _tell_full(rows: Dataset, encoder: Encoder, name: str) -> None:
    """Warn of rows that have exactly ``max_length`` tokens: nearly all of them were longer and were cut."""
    if encoder.max_length is None:
        return
    tables = rows.with_format("arrow").iter(_COUNTED_AT_ONCE)
    lengths = (pyarrow.compute.list_value_length(table["input_ids"]) for table in tables)
    full = sum(pyarrow.compute.sum(pyarrow.compute.equal(n, encoder.max_length)).as_py() for n in lengths)
    if full:
        log.warning(
            "%s data: %d of %d rows reach max_length=%d tokens, and what is longer is cut off at the %s: raise "
            "max_length (it takes memory), or split long rows",
            name, full, len(rows), encoder.max_length, "start" if encoder.keep_end else "end",
        )  # fmt: skip


def pack_all(dataset: AnyDataset, capacity: int, *, split: bool) -> Dataset:
    """Pack the rows. Raises ConfigError for a streamed data set, whose rows are not known in advance.

    Also raises ConfigError for rows with tasks, since a packed row would hold several of them.
    """
    if isinstance(dataset, IterableDataset):
        raise ConfigError("packing=True needs a data set that is not streamed: load it whole, or set packing=False")
    if TASK in columns_of(dataset):
        raise ConfigError(f"packing=True joins rows, and each has a task of its own ({TASK}): set packing=False")
    return pack(dataset, capacity, split=split)


def filled(dataset: Dataset, n_rows: int) -> Dataset:
    """Append ``n_rows`` padding rows, in which no token is trained, and return the rows.

    Sums over trained tokens do not change.
    """
    if not n_rows:
        return dataset
    first = dataset[0]
    # Two tokens, since nothing predicts the first one and a batch of such rows must have something to predict.
    tokens = {"input_ids": [first["input_ids"][0]] * 2, "labels": [IGNORED] * 2}
    row = {**first, **tokens, **({"seq_lengths": [2]} if "seq_lengths" in first else {})}
    return concatenate_datasets([dataset, Dataset.from_list([row] * n_rows, features=dataset.features)])


def digest(dataset: Dataset) -> str:
    """Return a hash of the token ids, labels and tasks of all rows, in order. Runs on equal data have equal hashes."""
    state = hashlib.blake2b(digest_size=16)
    for row in dataset:
        state.update(array("q", [len(row["input_ids"])]).tobytes())
        own = (row["input_ids"], row["labels"], row.get("seq_lengths", ()), [row[TASK]] if TASK in row else ())
        state.update(array("q", itertools.chain(*own)).tobytes())
    return state.hexdigest()


def columns_of(dataset: Dataset | IterableDataset) -> list[str]:
    """Return the names of the columns, streamed or not. Raises DataError if there are neither column names nor rows."""
    names = dataset.column_names or next(iter(dataset), None)
    if names is None:
        raise DataError("the data has no rows: give at least one")
    return list(names)


def has_trained_token(row: dict[str, list[int]]) -> bool:
    """Return True if any token of the row is trained."""
    return any(label != IGNORED for label in row["labels"])


def _all_masked(encoder: Encoder, name: str, columns: list[str], n_rows: int) -> str:
    looked_for = {
        "tokens": "labels other than -100, minus assistant_masks and completion_mask",
        "prompt-completion": "the text of the column 'completion' after the prompt",
        "messages": "the turns with role 'assistant' in the column 'messages'"
        if encoder.assistant_only
        else "any token of the column 'messages'",
        "text": f"any token of the column {encoder.text_field!r}",
    }[encoder.kind]
    limit = f" within max_length={encoder.max_length}" if encoder.max_length else ""
    return (
        f"every label of the {n_rows} rows of the {name} data is masked: nothing would be learned. Looked for "
        f"{looked_for}{limit}; the columns are {sorted(columns)}"
    )


def require_answers(kind: Kind, rows: Dataset, name: str, *, assistant: bool, completion: bool) -> None:
    """Raise ConfigError if ``assistant_only_loss`` or ``completion_only_loss`` is set, and rows of this kind have no
    assistant's turns or no completion.
    """
    columns = columns_of(rows)
    if assistant and (kind == "text" or (kind == "prompt-completion" and isinstance(_first(rows)["prompt"], str))):
        raise ConfigError(
            f"assistant_only_loss=True needs conversations (a column messages); the {name} data has {columns}"
            + ("; for these, completion_only_loss=True" if kind == "prompt-completion" else "")
        )
    if completion and kind in ("text", "messages"):
        raise ConfigError(
            f"completion_only_loss=True needs the columns prompt and completion; the {name} data has {columns}"
            + ("; for conversations, assistant_only_loss=True" if kind == "messages" else "; leave it out")
        )


def _first(rows: Dataset) -> dict[str, Any]:
    return cast("dict[str, Any]", next(iter(rows), {"prompt": None}))
