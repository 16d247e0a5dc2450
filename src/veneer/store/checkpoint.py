"""Streaming access to the weights of a base model, tensor by tensor: safetensors files, one or sharded, or a GGUF file.

A checkpoint is checked as a whole before anything is read from it, and only the requested tensor is in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Tensor

from veneer.disk.safetensors import read_header
from veneer.errors import FormatError
from veneer.store.checkpoint_files import raise_problems, tensors_in, tensors_of
from veneer.store.gguf.blocks import described_file

FINITE_CHUNK_VALUES = 1 << 20


class Stored(Protocol):
    """Tensor of a checkpoint: `StoredTensor`, or `GgufParameter`, which is decoded as it is read."""

    @property
    def name(self) -> str: ...
    @property
    def path(self) -> Path: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...

    def read(self) -> Tensor:
        """Return the tensor in its own memory. Raises FormatError if the file ends before the tensor does."""
        ...

    def blocks(self, n_values: int) -> Iterator[Tensor]:
        """Yield the rows (k, …) in order, about ``n_values`` values at a time. Raises FormatError as `read` does."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """Tensors of a checkpoint by name, in the order of the files and of the bytes in them."""

    tensors: Mapping[str, Stored]

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Return the checkpoint in a folder (``model.safetensors``, shards with an index, or the description of a GGUF
        file), or in one file.

        Raises FormatError that lists the problems of all files.
        """
        path = Path(path)
        file = described_file(path)
        if file is not None:
            return cls(file.tensors)
        return cls(tensors_in(path, read_header))

    @classmethod
    def from_files(cls, files: Iterable[str | Path]) -> Self:
        """Return the checkpoint made of these files. Raises FormatError as `open` does."""
        return cls(tensors_of([Path(file) for file in files], read_header))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())

    def read(self, name: str) -> Tensor:
        """Return one tensor. Raises FormatError if the name is unknown, the file is truncated, or a value
        is not finite.
        """
        return _finite(name, self._stored(name).read())

    def blocks(self, name: str, n_values: int) -> Iterator[Tensor]:
        """Yield the rows (k, …) of a tensor in order, about ``n_values`` values at a time.

        Raises FormatError as `read` does.
        """
        return (_finite(name, block) for block in self._stored(name).blocks(n_values))

    def _stored(self, name: str) -> Stored:
        if name not in self.tensors:
            raise FormatError(
                f"the checkpoint has no tensor {name!r}; it has {len(self.tensors)}, "
                f"such as {next(iter(self.tensors), None)!r}"
            )
        return self.tensors[name]

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors, one after the other. One FormatError at the end names all that hold NaN or infinity."""
        not_finite = []
        for name, stored in self.tensors.items():
            tensor = stored.read()
            if is_finite(tensor):
                yield name, tensor
            else:
                not_finite.append(f"tensor {name!r} holds values that are not finite")
            del tensor
        raise_problems(not_finite)


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not is_finite(tensor):
        raise FormatError(f"tensor {name!r} holds values that are not finite (NaN or infinity): save or fetch it again")
    return tensor


def is_finite(tensor: Tensor) -> bool:
    """Return True if every value is finite. A sum shows this in one pass, without a mask or copy as large
    as the tensor.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.dtype.itemsize > 1 and bool(tensor.sum().isfinite()):
        return True
    # finite values can have a sum that overflows, and torch neither sums nor tests 8-bit floats
    parts = torch.split(tensor.reshape(-1), FINITE_CHUNK_VALUES)
    return all(bool((part.to(torch.bfloat16) if part.dtype.itemsize == 1 else part).isfinite().all()) for part in parts)
