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

from veneer.disk.safetensors_header import DTYPES_OF_HEADERS, TensorEntry, read_entries
from veneer.errors import FormatError

DTYPES: dict[str, torch.dtype] = {code: getattr(torch, name) for code, (name, _) in DTYPES_OF_HEADERS.items()}
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
        """Yield the tensor's rows (k, …) in order, at most ``n_values`` values at a time, but at least one row.

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
    """Return a file's tensors in the order of their bytes, and all problems of the file as texts that do not name it.

    Raises FormatError if this user may not read it, or if it is gone.
    """
    entries, problems = read_entries(path)
    return {name: _stored(entry) for name, entry in entries.items()}, problems


def _stored(entry: TensorEntry) -> StoredTensor:
    dtype: torch.dtype = getattr(torch, entry.dtype)
    return StoredTensor(entry.name, entry.path, dtype, entry.shape, entry.start, entry.nbytes)


def read_all(path: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """Return the tensors of a file, as listed by `read_header`, read at once into one shared buffer.

    A tensor whose place in the file is not aligned to the size of its values has its own memory. Raises FormatError as
    `StoredTensor.read` does.
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
