"""JSON header of a safetensors file, read and checked without torch."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from veneer.errors import FormatError

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 64  # torch's
PREFIX_BYTES = 8
DTYPES_OF_HEADERS = MappingProxyType(
    {
        "F64": ("float64", 8),
        "F32": ("float32", 4),
        "F16": ("float16", 2),
        "BF16": ("bfloat16", 2),
        "F8_E4M3": ("float8_e4m3fn", 1),
        "F8_E5M2": ("float8_e5m2", 1),
        "F8_E8M0": ("float8_e8m0fnu", 1),
        "I64": ("int64", 8),
        "I32": ("int32", 4),
        "I16": ("int16", 2),
        "I8": ("int8", 1),
        "U64": ("uint64", 8),
        "U32": ("uint32", 4),
        "U16": ("uint16", 2),
        "U8": ("uint8", 1),
        "BOOL": ("bool", 1),
        "C64": ("complex64", 8),
    }
)
"""Types of values by their name in a header: torch's name, and the bytes of a value."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Location of one tensor on disk. ``dtype`` is torch's name; ``start`` counts bytes from the file's beginning."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_entries(path: Path) -> tuple[dict[str, TensorEntry], list[str]]:
    """Return a file's tensors in the order of their bytes, and all problems of the file as texts that do not name it.

    Raises FormatError if this user may not read it, or if it is gone.
    """
    try:
        header, data_start, data_bytes = read_table(path)
    except FormatError as error:
        return {}, [str(error)]
    except OSError as error:
        raise FormatError(f"{path} cannot be read ({error.strerror}): give a file that this user may read") from error
    problems: list[str] = []
    tensors: list[TensorEntry] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        tensor = _entry(path, name, entry, data_start)
        if isinstance(tensor, str):
            problems.append(tensor)
        else:
            tensors.append(tensor)
    tensors.sort(key=lambda t: (t.start, t.nbytes))
    return {t.name: t for t in tensors}, problems or _layout_problems(tensors, data_start, data_bytes)


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


def _entry(path: Path, name: str, entry: object, data_start: int) -> TensorEntry | str:
    """Return one tensor of a header, or the problem with it."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        return f"tensor {name!r} lacks one of dtype, shape, data_offsets"
    known, shape, offsets = DTYPES_OF_HEADERS.get(str(entry["dtype"])), entry["shape"], entry["data_offsets"]
    if known is None:
        return f"tensor {name!r} has dtype {entry['dtype']!r}; known are {', '.join(DTYPES_OF_HEADERS)}"
    if not _whole_numbers(shape):
        return f"tensor {name!r} has shape {shape!r}"
    if len(shape) > MAX_DIMENSIONS:
        return f"tensor {name!r} has {len(shape)} dimensions; {MAX_DIMENSIONS} is the most"
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        return f"tensor {name!r} has data_offsets {offsets!r}"
    dtype, itemsize = known
    nbytes = math.prod(shape) * itemsize
    if offsets[1] - offsets[0] != nbytes:
        return (
            f"tensor {name!r} of shape {shape} in {entry['dtype']} takes {nbytes} bytes, its data_offsets are {offsets}"
        )
    return TensorEntry(name, path, dtype, tuple(shape), data_start + offsets[0], nbytes)


def _whole_numbers(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values)


def _layout_problems(tensors: Sequence[TensorEntry], data_start: int, data_bytes: int) -> list[str]:
    """Return overlaps, gaps, and a file size that contradicts the header."""
    problems = []
    end = data_start
    for tensor in tensors:
        if tensor.start != end:
            what = (
                "overlaps the one before it"
                if tensor.start < end
                else f"leaves a gap of {tensor.start - end} bytes before it"
            )
            problems.append(f"tensor {tensor.name!r} {what}")
        end = max(end, tensor.start + tensor.nbytes)
    if end - data_start != data_bytes:
        what = "it is truncated" if end - data_start > data_bytes else "no tensor owns the last ones"
        problems.append(f"it holds {data_start + data_bytes:,} bytes, but its header describes {end:,}: {what}")
    return problems


class _DuplicateKeyError(Exception):
    """Error for a JSON object that has one key twice; the argument is the key."""


def _no_duplicates(items: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in items:
        if key in table:
            raise _DuplicateKeyError(key)
        table[key] = value
    return table
