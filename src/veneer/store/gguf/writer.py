"""Writing a GGUF file tensor by tensor, in one part or several, all or nothing.

Temporary files next to the target are renamed when the last byte is on disk.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import secrets
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import psutil
import torch
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from torch import Tensor

from veneer.errors import FormatError
from veneer.ops.ggml import row_bytes
from veneer.ops.ggml_types import GGML_TYPES
from veneer.store.gguf.keys import KeyValue
from veneer.store.reserved import UNCHANGED, disk_errors_told, reserve, write_at

ALIGNMENT = 32
_PARTIAL = ".partial-"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Tensor of the file: ggml's name of its type, and its shape in torch's order."""

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        *rows, columns = self.shape
        return int(np.prod(rows, dtype=np.int64)) * row_bytes(self.kind, columns)


class GgufFileWriter:
    """Writer of a GGUF file, as a context manager. Call ``writer.write(name, pieces)`` for every name, in any order.

    ``specs`` announces every tensor beforehand, so that each is written directly to its offset. ``max_part_bytes``
    splits the file into ``NAME-00001-of-00003.gguf`` and so on; None keeps it one. Leaving the block without an error
    moves the files into place. On an error nothing is left, and existing files are untouched. ``overwrite`` also
    removes the target's previous files, in any number of parts, once the new files are in place.

    Raises FormatError for bytes that do not fit the specs, tensors never written, and an existing target if
    ``overwrite`` is false. Raises DiskError if the disk is full or cannot be written to.
    """

    def __init__(
        self,
        target: Path,
        pairs: Sequence[KeyValue],
        specs: Sequence[TensorSpec],
        *,
        max_part_bytes: int | None = None,
        overwrite: bool = False,
    ) -> None:
        self.target = target.absolute()
        self._pairs = pairs
        self._parts = parts_of(specs, max_part_bytes)
        self.paths = part_paths(self.target, len(self._parts))
        self._specs = {spec.name: spec for spec in specs}
        self._missing = set(self._specs)
        self._places: dict[str, tuple[FileIO, int]] = {}
        self._overwrite = overwrite
        self._new: list[Path] = []
        self.nbytes = 0
        for path in self.paths:
            if path.is_dir() or (path.exists() and not overwrite):
                what = "is a folder" if path.is_dir() else "is there already"
                raise FormatError(f"{path} {what}: choose another name, or overwrite it (--force)")

    def __enter__(self) -> Self:
        _drop_leftovers(self.paths)
        mark = f"{_PARTIAL}{os.getpid()}-{secrets.token_hex(4)}"
        self._scratch = [path.with_name(f".{path.name}{mark}") for path in self.paths]
        with ExitStack() as stack, self._disk_errors_told():
            stack.callback(self._drop)
            self._files: list[FileIO] = []
            for path in self._scratch:
                self._files.append(path.open("wb", buffering=0))
            stack.callback(self._close)
            for number, specs in enumerate(self._parts):
                self._allocate(number, specs)
            self._undo = stack.pop_all()
        return self

    def write(self, name: str, pieces: Iterable[Tensor]) -> None:
        """Write the bytes of one tensor, in pieces, at its offset."""
        if name not in self._missing:
            what = "was written already" if name in self._specs else "is not among the tensors announced"
            raise FormatError(f"tensor {name!r} {what}")
        file, start = self._places[name]
        written, announced = 0, self._specs[name].nbytes
        for piece in pieces:
            data = piece.contiguous().view(torch.uint8).numpy().data.cast("B")
            if written + len(data) <= announced:
                with self._disk_errors_told():
                    write_at(file, start + written, data)
            written += len(data)
        if written != announced:
            raise FormatError(f"tensor {name!r} was announced with {announced:,} bytes and has {written:,}")
        self._missing.discard(name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._undo:
            if kind is not None:
                return
            if self._missing:
                missing = sorted(self._missing)[:20]
                raise FormatError(f"{len(self._missing)} tensors were announced and not written: {missing}")
            with self._disk_errors_told():
                for file in self._files:
                    os.fsync(file.fileno())
                self._close()
                for scratch, path in zip(self._scratch, self.paths, strict=True):
                    os.replace(scratch, path)
                    self._new.append(path)
                for path in _sets(self.target) if self._overwrite else ():
                    if path not in self.paths:
                        path.unlink()

    def _allocate(self, number: int, specs: Sequence[TensorSpec]) -> None:
        """Create a part at full size with its header, so that a full disk is found before any work."""
        header = GGUFWriter(None, "", use_temp_file=False)
        header.kv_data[0].clear()
        for pair in self._pairs if number == 0 else ():
            header.add_key_value(pair.key, pair.value, pair.kind, pair.item)
        if len(self._parts) > 1:
            header.add_key_value("split.no", number, GGUFValueType.UINT16)
            header.add_key_value("split.count", len(self._parts), GGUFValueType.UINT16)
            header.add_key_value("split.tensors.count", len(self._specs), GGUFValueType.INT32)
        for spec in specs:
            kind = GGMLQuantizationType(GGML_TYPES[spec.kind].number)
            header.add_tensor_info(spec.name, spec.shape, np.dtype(np.float32), spec.nbytes, raw_dtype=kind)
        header.write_header_to_file(self._scratch[number])
        header.write_kv_data_to_file()
        header.write_ti_data_to_file()
        header.close()
        end = _padded(self._scratch[number].stat().st_size)
        for spec in specs:
            self._places[spec.name] = self._files[number], end
            end += _padded(spec.nbytes)
        reserve(self._files[number], end)
        self.nbytes += end

    def _close(self) -> None:
        for file in self._files:
            file.close()

    def _drop(self) -> None:
        for path in self._scratch:
            with contextlib.suppress(OSError):
                path.unlink()

    def _disk_errors_told(self) -> AbstractContextManager[None]:
        return disk_errors_told(self.target, sum(spec.nbytes for spec in self._specs.values()), self._left)

    def _left(self) -> str:
        """Return the end of a message after a disk error: the files that are left, and the next step."""
        if not self._new:
            return UNCHANGED
        if len(self._new) == len(self.paths):
            return "The new file is complete. Parts of an older file of this name remain beside it: delete them."
        names = ", ".join(path.name for path in self._new)
        return (
            f"Only {names} {'is' if len(self._new) == 1 else 'are'} new, of {len(self.paths)} parts: the set is not "
            "whole. Run it again and overwrite it (--force)."
        )


def part_paths(target: Path, n_parts: int) -> list[Path]:
    """Return the names of a file's parts, as llama.cpp expects them; a single part is the target itself."""
    if n_parts == 1:
        return [target]
    stem = target.name.removesuffix(".gguf")
    return [target.with_name(f"{stem}-{number:05d}-of-{n_parts:05d}.gguf") for number in range(1, n_parts + 1)]


def _sets(target: Path) -> list[Path]:
    """Return a target's existing files: a single file, or any number of parts."""
    name = re.compile(rf"{re.escape(target.name.removesuffix('.gguf'))}-\d{{5}}-of-\d{{5}}\.gguf")
    found = [path for path in target.parent.iterdir() if path == target or name.fullmatch(path.name)]
    return [path for path in found if path.is_file()]


def file_nbytes(pairs: Iterable[KeyValue], specs: Sequence[TensorSpec]) -> int:
    """Return the size in bytes of a file in one part."""
    infos = sum(8 + len(spec.name.encode()) + 4 + 8 * len(spec.shape) + 4 + 8 for spec in specs)
    return _padded(24 + _pairs_nbytes(pairs) + infos) + sum(_padded(spec.nbytes) for spec in specs)


def parts_of(specs: Sequence[TensorSpec], max_bytes: int | None) -> list[list[TensorSpec]]:
    """Return the tensors of each part, in order. A part exceeds the limit only if a single tensor does."""
    parts: list[list[TensorSpec]] = [[]]
    held = 0
    for spec in specs:
        if max_bytes is not None and parts[-1] and held + spec.nbytes > max_bytes:
            parts.append([])
            held = 0
        parts[-1].append(spec)
        held += _padded(spec.nbytes)
    return parts


def _padded(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def _drop_leftovers(paths: Sequence[Path]) -> None:
    """Remove half-written files of these names that killed processes have left."""
    for path in paths:
        for leftover in path.parent.glob(f".{glob.escape(path.name)}{_PARTIAL}*"):
            owner = leftover.name.partition(_PARTIAL)[2].partition("-")[0]
            if not owner.isdigit() or not psutil.pid_exists(int(owner)):
                leftover.unlink(missing_ok=True)


def _pairs_nbytes(pairs: Iterable[KeyValue]) -> int:
    """Return the number of bytes that key-value pairs take in a file."""
    header = GGUFWriter(None, "")
    return sum(
        8 + len(pair.key.encode()) + len(header._pack_val(pair.value, pair.kind, add_vtype=True, sub_type=pair.item))
        for pair in pairs
    )
