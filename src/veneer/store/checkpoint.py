"""Streaming access to the weights of a base model, tensor by tensor: safetensors files, one or sharded, or a GGUF file.

A checkpoint is checked as a whole before anything is read from it, and only the requested tensor is in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol, Self

import torch
from torch import Tensor

from veneer.disk.safetensors import StoredTensor, read_header
from veneer.errors import FormatError
from veneer.store.gguf.blocks import described_file

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
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
        """Yield the rows (k, …) in order, about so many values at a time. Raises FormatError as `read` does."""
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
        if path.is_file():
            return cls.from_files([path])
        index = path / INDEX_NAME
        if index.is_file():
            return cls._from_index(index)
        if (path / SINGLE_NAME).is_file():
            return cls.from_files([path / SINGLE_NAME])
        raise FormatError(
            f"{path} holds neither {SINGLE_NAME} nor {INDEX_NAME}: give the folder of a model saved as safetensors"
        )

    @classmethod
    def from_files(cls, files: Iterable[str | Path]) -> Self:
        """Return the checkpoint made of these files. Raises FormatError as `open` does."""
        paths = [Path(file) for file in files]
        tensors, problems = _read_headers(paths)
        _raise(problems, paths[0].parent if paths else None)
        return cls(tensors)

    @classmethod
    def _from_index(cls, index: Path) -> Self:
        weight_map, problems = _read_index(index)
        files = sorted(set(weight_map.values()))
        outside = [f for f in files if not _is_inside(f)]
        problems += [f"{index.name} names {f!r}, which leaves the folder" for f in outside]
        present = [index.parent / f for f in files if f not in outside and (index.parent / f).is_file()]
        missing = [f for f in files if f not in outside and not (index.parent / f).is_file()]
        problems += [f"shard {f!r} is missing" for f in missing]
        tensors, found = _read_headers(present)
        problems += found
        unread = {index.parent / f for f in outside + missing} | ({index.parent / f for f in files} if found else set())
        for name, file in weight_map.items():
            held_by = tensors[name].path if name in tensors else None
            if index.parent / file not in unread and held_by != index.parent / file:
                problems.append(f"tensor {name!r} is not in {file!r}, where {index.name} says it is")
        _raise(problems, index.parent)
        return cls(tensors)

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
        """Yield the rows (k, …) of a tensor in order, in blocks of about so many values. Raises FormatError
        as `read` does.
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
        _raise(not_finite)


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


def _read_headers(files: list[Path]) -> tuple[dict[str, StoredTensor], list[str]]:
    tensors: dict[str, StoredTensor] = {}
    problems: list[str] = []
    for file in files:
        if not file.is_file():
            problems.append(f"{file} does not exist")
            continue
        found, wrong = read_header(file)
        problems += [f"{file.name}: {problem}" for problem in wrong]
        problems += [f"tensor {n!r} is in {tensors[n].path.name} and in {file.name}" for n in found if n in tensors]
        tensors |= found
    return tensors, problems


def _read_index(index: Path) -> tuple[dict[str, str], list[str]]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FormatError(f"{index} is not JSON ({error}): save or download it again") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index} has no weight_map from tensor names to files: save or download it again")
    wrong = [name for name, file in weight_map.items() if not isinstance(file, str)]
    return {n: f for n, f in weight_map.items() if n not in wrong}, [
        f"{index.name} maps {n!r} to something that is no file name" for n in wrong
    ]


def _is_inside(file: str) -> bool:
    """Return True if a file name from an index stays in the folder. Links are followed: the hub's cache has them."""
    parts = PurePosixPath(file.replace("\\", "/"))
    return not parts.is_absolute() and ".." not in parts.parts and ":" not in file


def _raise(problems: list[str], folder: Path | None = None) -> None:
    if problems:
        where, advice = (f" in {folder}", "; save or fetch it again") if folder else ("", "")
        raise FormatError(f"the checkpoint{where} cannot be used: {'; '.join(problems)}{advice}")
