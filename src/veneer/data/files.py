"""Rows of a file, numbered from one: JSON lines, CSV and text (counted by lines), a JSON list, parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from veneer.data.named_files import SUFFIXES, missing_told
from veneer.errors import DataError, listed

Row = dict[str, Any]
_SHOWN_PROBLEMS = 5


def numbered_rows(path: Path, problems: list[str]) -> Iterator[tuple[int, Row]]:
    """Return the objects of a file with their numbers. Anything else is skipped and noted in ``problems``.

    Raises DataError if the file is missing, is not a file, has an unknown suffix, or cannot be parsed.
    """
    readers = {
        ".jsonl": _json_lines, ".json": _json_list, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet, ".txt": _lines,
    }  # fmt: skip
    if not path.exists():
        raise DataError(missing_told(path))
    if not path.is_file():
        raise DataError(f"{path} is {'a folder' if path.is_dir() else 'no regular file'}: give a file with rows")
    if path.suffix not in readers:
        raise DataError(f"{path} must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    try:
        for number, row in readers[path.suffix](path, problems):
            if isinstance(row, dict):
                yield number, row
            else:
                problems.append(f"row {number}: must be an object, not {type(row).__name__}")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8 ({error}): save it as UTF-8") from error


def raise_all(source: object, problems: list[str]) -> None:
    """Raise one DataError for these problems, if there are any: the first few, and the number of others.

    A problem shared by several rows is reported once, with their numbers.
    """
    rows: dict[str, list[str]] = {}
    for problem in problems:
        row, _, what = problem.partition(": ")
        rows.setdefault(what, []).append(row.removeprefix("row "))
    told = [f"{_numbers(of)}: {what}" for what, of in rows.items()]
    if problems:
        raise DataError(listed(told, str(source), _SHOWN_PROBLEMS))


def _numbers(rows: list[str]) -> str:
    if len(rows) == 1:
        return f"row {rows[0]}"
    more = len(rows) - _SHOWN_PROBLEMS
    return f"rows {', '.join(rows[:_SHOWN_PROBLEMS])}" + (f" and {more} more" if more > 0 else "")


def require_one_form(forms: Iterable[tuple[int, str]]) -> None:
    """Raise DataError that names the first row whose form differs from that of the rows before it."""
    before: tuple[int, str] | None = None
    for number, form in forms:
        before = before or (number, form)
        if form != before[1]:
            raise DataError(
                f"row {number} is of the form {form}, and row {before[0]} of the form {before[1]}: bring all rows into "
                "one form, or put them into files of their own"
            )


def _json_lines(path: Path, problems: list[str]) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate((each.rstrip("\n") for each in lines), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                problems.append(f"row {number}: not JSON ({error.msg}, character {error.pos + 1} of {line[:60]!r})")
                continue
            except ValueError as error:  # a number with thousands of digits
                problems.append(f"row {number}: cannot be read ({error})")
                continue
            yield number, row


def _lines(path: Path, problems: list[str]) -> Iterator[tuple[int, Any]]:
    """Yield each line of plain text that is not empty, with its number."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, {"text": line.rstrip("\n")}


def _csv(path: Path, problems: list[str]) -> Iterator[tuple[int, Any]]:
    """Yield each row as strings by the header's names, with the number of its first line."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        try:
            header = _header(path, next(lines, []))
            begins = lines.line_num + 1
            for cells in lines:
                if cells and len(cells) != len(header):
                    problems.append(f"row {begins}: {len(cells)} cells, and the first line names {len(header)} columns")
                elif cells:
                    yield begins, dict(zip(header, cells, strict=True))
                begins = lines.line_num + 1
        except csv.Error as error:
            raise DataError(f"{path}: line {lines.line_num}: not CSV ({error})") from error


def _header(path: Path, names: list[str]) -> list[str]:
    """Return the column names of a CSV file. Raises DataError if there are none, or if one is empty or repeated."""
    if not names:
        raise DataError(f"{path} is empty: its first line must name the columns, such as prompt,completion")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not all(name.strip() for name in names):
        wrong = f"{twice} twice" if twice else "a column without a name"
        raise DataError(f"{path}: its first line must name the columns, each once, and it has {wrong}: {names}")
    return [name.strip() for name in names]


def _json_list(path: Path, problems: list[str]) -> Iterator[tuple[int, Any]]:
    text = path.read_text(encoding="utf-8")
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); for one object a line, name it .jsonl") from error
    if not isinstance(rows, list):
        raise DataError(f"{path} must hold a list of objects, not {type(rows).__name__}")
    yield from enumerate(rows, start=1)


def _parquet(path: Path, problems: list[str]) -> Iterator[tuple[int, Any]]:
    # Here, as its import takes long.
    import pyarrow.lib
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            yield from enumerate(rows, start=1)
    except (pyarrow.lib.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a parquet file ({error}): save it again as parquet") from error
