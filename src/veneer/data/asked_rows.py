"""Rows of files about which a model is asked, and the regular expressions for their answers. Torch is not imported
here.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.data.column_templates import fill_template
from veneer.data.files import numbered_rows, raise_all, require_one_form
from veneer.data.reader import RowReader, form_of
from veneer.errors import ConfigError, DataError

Row = Mapping[str, Any]
_FIRST = 8


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a .jsonl, .json or .parquet file, or a .txt file as one row ``{"text": …}``.

    Raises DataError if there is no such file, or if a row, named by its number, is not an object.
    """
    if path.suffix == ".txt" and path.is_file():
        try:
            return [{"text": path.read_text(encoding="utf-8")}]
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not text in UTF-8 ({error}): save it as UTF-8") from error
    problems: list[str] = []
    rows = [row for _, row in numbered_rows(path, problems)]
    raise_all(path, problems)
    return rows


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of prompts, as `read_rows` does, but each non-empty line of a .txt file is a prompt.

    Raises DataError, also for a file without rows.
    """
    rows = read_rows(path)
    if path.suffix == ".txt":
        rows = [{"prompt": line} for line in rows[0]["text"].splitlines() if line.strip()]
    if not rows:
        raise DataError(f"{path} holds no rows: give at least one")
    return rows


def as_trained(rows: Sequence[Row], reader: RowReader) -> list[dict[str, Any]]:
    """Return the rows in the form in which they would be trained, so that evaluation matches training. Other fields are
    kept.

    Raises DataError that names the row. Raises ConfigError if the reader has ``chat`` or ``system`` and the rows are
    not conversations.
    """
    replaced = {"prompt", "completion", "instruction", "input", "output", "response", "conversations"}
    read: list[dict[str, Any]] = []
    form = None
    for number, row in enumerate(rows, 1):
        try:
            form = form or reader.form(row)
            final = reader.read(row, form)
        except DataError as error:
            raise DataError(f"row {number}: {error}") from error
        read.append({**{key: value for key, value in row.items() if key not in replaced}, **final})
    require_one_form((number, form_of(row)) for number, row in enumerate(read, 1))
    return read


def as_templated(rows: Sequence[Row], prompt: str, answer_field: str | None) -> list[dict[str, str]]:
    """Return rows with any fields as prompt and completion, or as plain text if no field holds an answer.

    If there is a list of answers, the first is the completion. Raises DataError that names the row, ConfigError for an
    invalid template.
    """
    read = []
    for number, row in enumerate(rows, 1):
        try:
            text = fill_template(prompt, row)
            answer = None if answer_field is None else answers_in(row, answer_field)[0]
        except DataError as error:
            raise DataError(f"row {number}: {error}") from error
        read.append({"text": text} if answer is None else {"prompt": text, "completion": answer})
    return read


def no_answer(row: Row) -> DataError:
    """Return the error about a row that holds no right answer."""
    return DataError(
        f"it has the fields {sorted(row)}; needed are messages, or prompt and completion, or a prompt template "
        "(--prompt) with an answer field (--answer-field)"
    )


def require_askable(
    path: Path, reader: RowReader, prompt: str | None, answer_field: str | None, *, judged: bool = False
) -> None:
    """Check the first rows of a file. Raises the errors of `as_trained`, or those of `as_templated` if there is a
    ``prompt``.

    Raises DataError for a file without rows. If answers are ``judged``, it also raises DataError for rows without a
    right answer.
    """
    rows = read_rows(path) if path.suffix == ".txt" else [row for _, row in _first_of(path)]
    if not rows:
        raise DataError(f"{path} holds no rows: give at least one")
    if prompt is None:
        rows = as_trained(rows, reader)
    else:
        as_templated(rows, prompt, answer_field)
    for number, row in enumerate(rows, 1):
        try:
            if answer_field is not None:
                answers_in(row, answer_field)
            elif judged and "text" in row and prompt is None:
                raise no_answer(row)
        except DataError as error:
            raise DataError(f"row {number}: {error}") from error


def _first_of(path: Path) -> list[tuple[int, dict[str, Any]]]:
    problems: list[str] = []
    first = list(itertools.islice(numbered_rows(path, problems), _FIRST))
    raise_all(path, problems)
    return first


def answers_in(row: Row, field: str) -> tuple[str, ...]:
    """Return the right answers in a field of a row. Raises DataError if there is no such field, or nothing in it."""
    if field not in row:
        raise DataError(f"no field {field!r}; it has {sorted(row)}. Name one of these")
    value = row[field]
    values = value if isinstance(value, list) else [value]
    if not values or any(one is None for one in values):
        raise DataError(f"the field {field!r} holds no answer, but {value!r:.60}: give a text, or a list of texts")
    return tuple(str(one) for one in values)


def pattern_of_answers(pattern: str) -> re.Pattern[str]:
    """Return a compiled regular expression. Raises ConfigError if it is invalid."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"pattern {pattern!r} is not a regular expression ({error}): correct it") from error
