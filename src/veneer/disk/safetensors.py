"""Layout of one safetensors file: eight bytes of header length, a JSON header, then the tensors without gaps.

Files are read without a memory map. Mapped pages count as resident memory until they are unmapped, so that a map of a
whole shard would defeat streaming.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save
from torch import Tensor

from veneer.disk.safetensors_header import read_table
from veneer.errors import FormatError

MAX_DIMENSIONS = 64  # torch's

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Location of one tensor on disk. ``start`` counts bytes from the beginning of the file."""

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def read(self) -> Tensor:
        """Return the tensor in its own memory. Raises FormatError if the file ends before the tensor does."""
        with self.path.open("rb", buffering=0) as file:
            return self._part(file, 0, self.nbytes).view(self.dtype).view(self.shape)

    def blocks(self, n_values: int) -> Iterator[Tensor]:
        """Yield the tensor's rows (k, …) in order, at most so many values at a time, but at least one row.

        A tensor without rows is one block. Raises FormatError as `read` does.
        """
        if not self.shape or not self.nbytes:
            yield self.read()
            return
        row_bytes = self.nbytes // self.shape[0]
        step = max(1, n_values * self.dtype.itemsize // row_bytes)
        with self.path.open("rb", buffering=0) as file:
            for first in range(0, self.shape[0], step):
                n_rows = min(step, self.shape[0] - first)
                raw = self._part(file, first * row_bytes, n_rows * row_bytes)
                yield raw.view(self.dtype).view(n_rows, *self.shape[1:])

    def _part(self, file: FileIO, start: int, n_bytes: int) -> Tensor:
        raw = torch.empty(n_bytes, dtype=torch.uint8)
        view = raw.numpy().data
        file.seek(self.start + start)
        filled = 0
        while filled < n_bytes:
            n_read = file.readinto(view[filled:])
            if not n_read:
                raise FormatError(
                    f"{self.path} ends inside tensor {self.name!r}: the file is truncated. Fetch or copy it again."
                )
            filled += n_read
        return raw


def read_header(path: Path) -> tuple[dict[str, StoredTensor], list[str]]:
    """Return the tensors of a file in the order of their bytes, and all its problems, without the file's name.

    Raises FormatError if this user may not read it, or if it is gone.
    """
    try:
        header, data_start, data_bytes = read_table(path)
    except FormatError as error:
        return {}, [str(error)]
    except OSError as error:
        raise FormatError(f"{path} cannot be read ({error.strerror}): give a file that this user may read") from error
    problems: list[str] = []
    tensors: list[StoredTensor] = []
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


def read_all(path: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """Return the tensors of a file, as listed by `read_header`, read at once into one shared buffer.

    A tensor that is not aligned to its values' size there has its own memory. Raises FormatError as `StoredTensor.read`
    does.
    """
    if not tensors:
        return {}
    start = min(tensor.start for tensor in tensors.values())
    last = max(tensors.values(), key=lambda tensor: tensor.start + tensor.nbytes)
    n_bytes = last.start + last.nbytes - start
    whole = StoredTensor(last.name, path, torch.uint8, (n_bytes,), start, n_bytes).read()
    found = {}
    for name, tensor in tensors.items():
        at = tensor.start - start
        raw = whole[at : at + tensor.nbytes]
        raw = raw if at % tensor.dtype.itemsize == 0 else raw.clone()
        found[name] = raw.view(tensor.dtype).view(tensor.shape)
    return found


def header_bytes(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """Return the header of a file with these tensors in this order, and each tensor's offset after it."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offsets: dict[str, int] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        offsets[name] = end
        end += math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start on a multiple of eight bytes
    return struct.pack("<Q", len(text)) + text, offsets


def tensors_to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Return a safetensors file as bytes. Its tensors are contiguous copies on the CPU that share no memory."""
    copies = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    return cast(bytes, save(copies, {"format": "pt"}))


def _entry(path: Path, name: str, entry: object, data_start: int) -> StoredTensor | str:
    """One tensor of a header, or what is wrong with it."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        return f"tensor {name!r} lacks one of dtype, shape, data_offsets"
    dtype, shape, offsets = DTYPES.get(str(entry["dtype"])), entry["shape"], entry["data_offsets"]
    if dtype is None:
        return f"tensor {name!r} has dtype {entry['dtype']!r}; known are {', '.join(DTYPES)}"
    if not _whole_numbers(shape):
        return f"tensor {name!r} has shape {shape!r}"
    if len(shape) > MAX_DIMENSIONS:
        return f"tensor {name!r} has {len(shape)} dimensions; {MAX_DIMENSIONS} is the most"
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        return f"tensor {name!r} has data_offsets {offsets!r}"
    nbytes = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != nbytes:
        return (
            f"tensor {name!r} of shape {shape} in {entry['dtype']} takes {nbytes} bytes, its data_offsets are {offsets}"
        )
    return StoredTensor(name, path, dtype, tuple(shape), data_start + offsets[0], nbytes)


def _whole_numbers(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values)


def _layout_problems(tensors: list[StoredTensor], data_start: int, data_bytes: int) -> list[str]:
    """Overlaps, gaps, and data that the file does not hold."""
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
        what = "truncated" if end - data_start > data_bytes else "with bytes that no tensor claims"
        problems.append(f"it holds {data_start + data_bytes:,} bytes where its header tells of {end:,}: {what}")
    return problems
