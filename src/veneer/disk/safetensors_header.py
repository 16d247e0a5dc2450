"""JSON header of a safetensors file, read without torch."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from veneer.errors import FormatError

MAX_HEADER_BYTES = 100_000_000
PREFIX_BYTES = 8


def read_table(path: Path) -> tuple[dict[str, Any], int, int]:
    """Return the parsed header, the offset of the data, and its number of bytes. Raises FormatError."""
    with path.open("rb") as file:
        file_bytes = file.seek(0, 2)
        file.seek(0)
        prefix = file.read(PREFIX_BYTES)
        if len(prefix) < PREFIX_BYTES:
            raise FormatError(f"it holds {file_bytes} bytes: too short to be a safetensors file")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(file_bytes - PREFIX_BYTES, MAX_HEADER_BYTES):
            raise FormatError(
                f"it claims a header of {length:,} bytes and holds {file_bytes:,} in all: "
                "truncated, or not a safetensors file"
            )
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_no_duplicates)
    except ValueError as error:  # no JSON, no text, or a number of more digits than Python reads
        raise FormatError(f"the header is not JSON ({error})") from error
    except RecursionError as error:
        raise FormatError("the header is nested too deeply to be a table of tensors") from error
    except _DuplicateKeyError as error:
        raise FormatError(f"the header names {error.args[0]!r} twice") from error
    if not isinstance(header, dict):
        raise FormatError(f"the header is a {type(header).__name__}, not a table of tensors")
    start = PREFIX_BYTES + length
    return header, start, file_bytes - start


class _DuplicateKeyError(Exception):
    """A JSON object names one key twice; the key is the argument."""


def _no_duplicates(items: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in items:
        if key in table:
            raise _DuplicateKeyError(key)
        table[key] = value
    return table
