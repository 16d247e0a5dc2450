"""GGUF files opened with the reader of the gguf package, and the values of their keys."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from gguf import GGUFReader

from veneer.errors import FormatError


def open_gguf(path: Path) -> GGUFReader:
    """Return the reader of a GGUF file. Raises FormatError if the file is not GGUF or is truncated."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise FormatError(f"{path} is not a GGUF file: it does not start with the bytes GGUF. Give a .gguf file")
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, struct.error) as error:
        raise FormatError(
            f"{path} is a damaged GGUF file, perhaps cut short ({path.stat().st_size:,} bytes): {error}. "
            "Download it again."
        ) from error


def value_of(reader: GGUFReader, key: str) -> Any:
    """Return the value of a key; None if it is missing."""
    field = reader.get_field(key)
    return None if field is None else field.contents()
