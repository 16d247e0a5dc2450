"""Importance matrices: the mean square of every input column of a model's matrices, over a text.

Source: ggml-org/llama.cpp, tools/imatrix: GGUF files since July 2025, and the ``.dat`` files before them.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from gguf import GGUFReader, GGUFValueType
from torch import Tensor

from veneer.errors import FormatError
from veneer.store.gguf.keys import KeyValue
from veneer.store.gguf.reader import value_of
from veneer.store.gguf.writer import GgufFileWriter, TensorSpec

_SUMS, _COUNTS = ".in_sum2", ".counts"
_LONGEST_NAME, _MOST_ENTRIES = 4096, 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Importance:
    """Importance matrix. ``means`` are float32, by the matrix's name in the file: (columns,), or (experts * columns,)
    for stacked experts.
    """

    path: Path
    means: Mapping[str, Tensor]
    data_set: str = ""
    n_chunks: int = 0

    def of(self, name: str, columns: int, n_experts: int) -> Tensor | None:
        """Return the means (experts, columns) for the matrix ``name``; None if the file has none for it.

        Raises FormatError if their number differs.
        """
        found = self.means.get(name)
        if found is None:
            return None
        if found.numel() != columns * n_experts:
            raise FormatError(
                f"{self.path} holds {found.numel()} values for {name}, which has {columns * n_experts}: it was "
                "collected on another model. Collect one on this model"
            )
        return found.view(n_experts, columns)

    def pairs(self) -> list[KeyValue]:
        """Return the pairs in which llama-quantize records the importance matrix."""
        return [
            KeyValue("quantize.imatrix.file", _cut(self.path.name), GGUFValueType.STRING),
            KeyValue("quantize.imatrix.dataset", _cut(self.data_set), GGUFValueType.STRING),
            KeyValue("quantize.imatrix.entries_count", len(self.means), GGUFValueType.INT32),
            KeyValue("quantize.imatrix.chunks_count", self.n_chunks, GGUFValueType.INT32),
        ]


def read_importance(path: Path) -> Importance:
    """Return an importance matrix from a file.

    Raises FormatError if the file has another format, is damaged, or holds a value that cannot be a mean square.
    """
    if not path.is_file():
        raise FormatError(
            f"no importance matrix {str(path)!r}: there is no such file. Collect one with `veneer export importance`"
        )
    with path.open("rb") as file:
        is_gguf = file.read(4) == b"GGUF"
    try:
        found = _read_gguf(path) if is_gguf else _read_dat(path)
    except (ValueError, IndexError, KeyError, OverflowError, struct.error) as error:
        raise FormatError(f"{path} is no importance matrix, or is damaged: {error}. Collect it again") from error
    wrong = [name for name, values in found.means.items() if not bool((values.isfinite() & (values >= 0)).all())]
    if wrong:
        raise FormatError(f"{path} holds values for {wrong[0]} that are not finite or below zero. Collect it again")
    if not found.means:
        raise FormatError(f"{path} holds no matrices. Collect it again")
    return found


def write_importance(
    path: Path,
    sums: Mapping[str, Tensor],
    counts: Mapping[str, Tensor],
    *,
    data_sets: Sequence[str],
    n_chunks: int,
    chunk_size: int,
    overwrite: bool = False,
) -> None:
    """Write sums of squares (experts, columns) and their numbers of rows (experts,). A matrix counts as one expert.

    Raises DiskError if the disk is full.
    """
    text, number = GGUFValueType.STRING, GGUFValueType.UINT32
    pairs = [
        KeyValue("general.type", "imatrix", text),
        KeyValue("imatrix.datasets", list(data_sets), GGUFValueType.ARRAY, text),
        KeyValue("imatrix.chunk_count", n_chunks, number),
        KeyValue("imatrix.chunk_size", chunk_size, number),
    ]
    tensors: dict[str, Tensor] = {}
    for name in sorted(sums):
        tensors[name + _SUMS] = sums[name].float()
        tensors[name + _COUNTS] = counts[name].float().view(-1, 1)
    specs = [TensorSpec(name, "F32", tuple(tensor.shape)) for name, tensor in tensors.items()]
    with GgufFileWriter(path, pairs, specs, overwrite=overwrite) as writer:
        for name, tensor in tensors.items():
            writer.write(name, [tensor])


def _read_gguf(path: Path) -> Importance:
    reader = GGUFReader(path)
    if value_of(reader, "general.type") != "imatrix":
        raise FormatError(
            f"{path} is a GGUF file, and no importance matrix (general.type is not 'imatrix'). Collect one with "
            "`veneer export importance`"
        )
    tensors = {tensor.name: torch.tensor(tensor.data, dtype=torch.float32) for tensor in reader.tensors}
    means = {}
    for name, sums in tensors.items():
        if name.endswith(_SUMS):
            counts = tensors[name.removesuffix(_SUMS) + _COUNTS].reshape(-1, 1)
            if not len(counts) or sums.numel() % len(counts):
                raise ValueError(f"{name.removesuffix(_SUMS)} has {sums.numel()} sums for {len(counts)} counts")
            mean = torch.where(counts > 0, sums.reshape(len(counts), -1) / counts, torch.ones(()))
            means[name.removesuffix(_SUMS)] = mean.reshape(-1)
    data_sets, n_chunks = (value_of(reader, f"imatrix.{key}") for key in ("datasets", "chunk_count"))
    return Importance(path=path, means=means, data_set=next(iter(data_sets or ()), ""), n_chunks=n_chunks or 0)


def _read_dat(path: Path) -> Importance:
    means = {}
    with path.open("rb") as file:
        n_entries = _whole(file, _MOST_ENTRIES)
        for _ in range(n_entries):
            name = _exactly(file, _whole(file, _LONGEST_NAME)).decode("utf-8")
            n_calls, n_values = _whole(file, 1 << 30), _whole(file, 1 << 30)
            values = torch.frombuffer(bytearray(_exactly(file, 4 * n_values)), dtype=torch.float32)
            means[name] = values / n_calls if n_calls else torch.ones_like(values)
        rest = file.read(8)
        if len(rest) < 8:
            return Importance(path=path, means=means)
        n_chunks, length = struct.unpack("<ii", rest)
        data_set = _exactly(file, length).decode("utf-8", errors="replace")
    return Importance(path=path, means=means, data_set=data_set, n_chunks=n_chunks)


def _whole(file: BinaryIO, most: int) -> int:
    (number,) = struct.unpack("<i", _exactly(file, 4))
    if not 0 <= number <= most:
        raise ValueError(f"a count of {number}")
    return int(number)


def _exactly(file: BinaryIO, n_bytes: int) -> bytes:
    found = file.read(n_bytes)
    if len(found) != n_bytes:
        raise ValueError("it ends too early")
    return found


def _cut(text: str) -> str:
    return text.encode()[:127].decode(errors="ignore")
