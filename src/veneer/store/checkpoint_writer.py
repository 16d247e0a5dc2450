"""Writing a checkpoint tensor by tensor: shards of limited size with an index, all or nothing.

Files are written into a temporary folder next to the target, which is renamed when the last byte is on disk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from veneer.contract.file import CONFIG_FILE
from veneer.disk.folder import new_folder
from veneer.disk.safetensors import header_bytes
from veneer.errors import DiskError, FormatError
from veneer.store.checkpoint_files import INDEX_NAME, SINGLE_NAME
from veneer.store.reserved import UNCHANGED, disk_errors_told, reserve, write_at

Specs = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
DEFAULT_SHARD_BYTES = 5_000_000_000
PIECE_VALUES = 1 << 18


class CheckpointWriter:
    """Writer of a checkpoint, as a context manager. Call ``writer.write(name, tensor)`` for every name, in any order.

    ``specs`` gives dtype and shape of every tensor beforehand, so that each is written directly to its offset and none
    is kept. Files that accompany the weights go into ``writer.staging``. Leaving the block without an error moves the
    folder into place. On an error nothing is left, and existing files are untouched.

    Raises FormatError for a tensor that does not fit its spec or was never written. Raises FormatError if the target
    holds files and ``overwrite`` is false, or if the files are not those of a model alone. Raises DiskError if the disk
    is full or cannot be written to.
    """

    def __init__(
        self, target: str | Path, specs: Specs, *, max_shard_bytes: int = DEFAULT_SHARD_BYTES, overwrite: bool = False
    ) -> None:
        self.target = Path(target).absolute()
        _require_replaceable(self.target, overwrite)
        self._specs = dict(specs)
        self._shards = plan_shards(specs, max_shard_bytes)
        self._shard_of = {name: shard for shard, names in self._shards.items() for name in names}
        self._missing = set(specs)
        self._files: dict[str, FileIO] = {}
        self._starts: dict[str, int] = {}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            try:
                self.staging = stack.enter_context(new_folder(self.target))
            except OSError as error:
                raise DiskError(f"cannot write beside {self.target}: {error}. Choose another place") from error
            stack.callback(self._close)
            with self._disk_errors_told():
                for shard in self._shards:
                    self._allocate(shard)
            self._closing = stack.pop_all()
        return self

    def write(self, name: str, tensor: Tensor, *, convert: bool = False) -> None:
        """Write one tensor at its offset. ``convert`` casts it to the announced dtype, without a second
        tensor as large.
        """
        if name not in self._missing:
            what = "was written already" if name in self._specs else "is not among the tensors announced"
            raise FormatError(f"tensor {name!r} {what}")
        dtype, shape = self._specs[name]
        if tuple(tensor.shape) != shape or (tensor.dtype != dtype and not convert):
            raise FormatError(
                f"tensor {name!r} was announced as {dtype} {shape} and is {tensor.dtype} {tuple(tensor.shape)}"
            )
        file = self._files[self._shard_of[name]]
        with self._disk_errors_told():
            start = self._starts[name]
            for piece in _pieces(tensor.detach()):
                data = piece.to("cpu", dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data
                write_at(file, start, data)
                start += len(data)
        self._missing.discard(name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._closing.__exit__(kind, error, trace)
            return
        with self._disk_errors_told(), self._closing:
            if self._missing:
                raise FormatError(
                    f"{len(self._missing)} tensors were announced and not written: {sorted(self._missing)[:20]}"
                )
            self._write_index()

    def _allocate(self, shard: str) -> None:
        """Create the file at full size with its header, so that a full disk is found before any work."""
        specs = {name: self._specs[name] for name in self._shards[shard]}
        header, offsets = header_bytes(specs, {"format": "pt"})
        file = (self.staging / shard).open("wb", buffering=0)
        self._files[shard] = file
        end = len(header) + sum(_nbytes(spec) for spec in specs.values())
        reserve(file, end)
        write_at(file, 0, memoryview(header))
        self._starts |= {name: len(header) + offset for name, offset in offsets.items()}

    def _write_index(self) -> None:
        if len(self._shards) > 1:
            total = sum(_nbytes(spec) for spec in self._specs.values())
            index = {"metadata": {"total_size": total}, "weight_map": self._shard_of}
            (self.staging / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")

    def _close(self) -> None:
        for file in self._files.values():
            file.close()

    def _disk_errors_told(self) -> AbstractContextManager[None]:
        total = sum(_nbytes(spec) for spec in self._specs.values())
        return disk_errors_told(self.target, total, lambda: UNCHANGED)


def plan_shards(specs: Specs, max_shard_bytes: int) -> dict[str, list[str]]:
    """Return the tensors of each file, in order. A file exceeds ``max_shard_bytes`` only if a single tensor does."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if groups[-1] and size + _nbytes(spec) > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += _nbytes(spec)
    if len(groups) == 1:
        return {SINGLE_NAME: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}


def _nbytes(spec: tuple[torch.dtype, tuple[int, ...]]) -> int:
    dtype, shape = spec
    return torch.Size(shape).numel() * dtype.itemsize


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    """Return the tensor in parts along its first dimension, each small enough to be converted in memory."""
    if tensor.ndim == 0 or tensor.numel() <= PIECE_VALUES:
        return (tensor,)
    return torch.split(tensor, max(1, PIECE_VALUES * len(tensor) // tensor.numel()))


def _require_replaceable(target: Path, overwrite: bool) -> None:
    held = {path.name: path for path in sorted(target.iterdir())} if target.is_dir() else {}
    if held and not overwrite:
        raise FormatError(f"{target} is not empty: choose another folder, or overwrite it (--force)")
    foreign = [name for name, path in held.items() if path.is_dir() or name == CONFIG_FILE]
    if not any(name == "config.json" or name.endswith(".safetensors") for name in held):
        foreign = list(held)
    if foreign:
        raise FormatError(
            f"{target} holds {foreign[0]!r}: only a folder that holds a model alone is overwritten. "
            "Choose another folder."
        )
