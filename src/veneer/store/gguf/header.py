"""Header of a GGUF file: its keys, and its tensors by name, shape and type; the vocabulary too if it is asked for."""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from veneer.errors import FormatError

_NUMBERS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
Kind = TypeVar("Kind", GGUFValueType, GGMLQuantizationType)
_KEPT = 512  # values of an array: one a layer, but no vocabulary
_DEEPEST = 4  # arrays within arrays


@dataclass(frozen=True, slots=True)
class Long:
    """Stand-in for an array that is too long to be kept: only its length."""

    n_values: int


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Tensor in the file: its name, shape (in torch's order, the fastest dimension last), type and bytes.

    ``start`` counts bytes from the beginning of the file.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    n_bytes: int
    start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """Header of a file: values by key (`Long` for omitted arrays), tensors, and the size of the whole file in bytes."""

    values: Mapping[str, Any]
    tensors: tuple[GgufTensor, ...]
    n_bytes: int


def read_header(path: Path, *, whole: bool = False) -> GgufHeader:
    """Return the header of a GGUF file (llama.cpp's format, versions 2 and 3). Arrays of more than 512 values, such as
    a vocabulary, are kept only if ``whole`` is True.

    Raises FormatError if the file is not GGUF, damaged or truncated.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise FormatError(f"{path} is not a GGUF file: it does not start with the bytes GGUF. Give a .gguf file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            try:
                return _header(_Cursor(view, math.inf if whole else _KEPT), path)
            except (ValueError, OverflowError) as error:
                raise FormatError(
                    f"{path} is a damaged GGUF file, perhaps cut short ({len(view):,} bytes): {error}. Download it "
                    "again."
                ) from error


def _header(cursor: _Cursor, path: Path) -> GgufHeader:
    version = cursor.number("I")
    if version not in (2, 3):
        raise FormatError(f"{path} is a GGUF file of version {version}; 2 and 3 are read here. Convert the model again")
    n_tensors, n_values = cursor.number("Q"), cursor.number("Q")
    values = {cursor.text(): cursor.value(cursor.kind(GGUFValueType)) for _ in range(cursor.fitting(n_values))}
    found = [cursor.tensor() for _ in range(cursor.fitting(n_tensors))]
    data = -(-cursor.at // _alignment(values)) * _alignment(values)
    tensors = tuple(replace(tensor, start=data + tensor.start) for tensor in found)
    end = max((tensor.start + tensor.n_bytes for tensor in tensors), default=0)
    if end > len(cursor.view):
        raise ValueError(f"its tensors end at byte {end:,}")
    return GgufHeader(values=values, tensors=tensors, n_bytes=len(cursor.view))


def _alignment(values: Mapping[str, Any]) -> int:
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    return alignment


class _Cursor:
    """Cursor that reads one value after another. Raises ValueError beyond the end of the file."""

    def __init__(self, view: mmap.mmap, most: float) -> None:
        self.view, self.at, self.most = view, 4, most  # values of an array that is kept

    def number(self, kind: str) -> Any:
        width = struct.calcsize(f"<{kind}")
        if self.at + width > len(self.view):
            raise ValueError("it ends within its header")
        (value,) = struct.unpack_from(f"<{kind}", self.view, self.at)
        self.at += width
        return value

    def kind(self, kinds: type[Kind]) -> Kind:
        number = self.number("I")
        try:
            return kinds(number)
        except ValueError as error:
            raise ValueError(f"it declares the unknown type {number} at byte {self.at - 4:,}") from error

    def fitting(self, n: int, n_bytes: int = 1) -> int:
        """Return n if the file has room for n items of at least ``n_bytes`` each. Raises ValueError otherwise."""
        if n * n_bytes > len(self.view) - self.at:
            raise ValueError(f"it declares {n:,} values at byte {self.at:,}, more than it can hold")
        return n

    def text(self) -> str:
        n = self.fitting(self.number("Q"))
        self.at += n
        return self.view[self.at - n : self.at].decode(errors="replace")

    def value(self, kind: GGUFValueType, depth: int = 0) -> Any:
        if kind == GGUFValueType.STRING:
            return self.text()
        return self._array(depth) if kind == GGUFValueType.ARRAY else self.number(_NUMBERS[kind])

    def tensor(self) -> GgufTensor:
        """Read the description of a tensor. Its ``start`` is the offset in the file, which counts from the end of the
        header.
        """
        name = self.text()
        shape = tuple(self.number("Q") for _ in range(self.fitting(self.number("I"), 8)))
        kind = self.kind(GGMLQuantizationType)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        n_bytes = math.prod(shape) // block * block_bytes
        return GgufTensor(name, shape[::-1], kind.name, n_bytes, self.number("Q"))

    def _array(self, depth: int) -> Any:
        if depth == _DEEPEST:
            raise ValueError(f"arrays nest deeper than {_DEEPEST}")
        kind, n = self.kind(GGUFValueType), self.number("Q")
        if kind in _NUMBERS:
            return self._numbers(_NUMBERS[kind], n)
        if kind == GGUFValueType.STRING:
            return self._texts(self.fitting(n, 8))
        return [self.value(kind, depth + 1) for _ in range(self.fitting(n))]

    def _numbers(self, kind: str, n: int) -> Any:
        start, width = self.at, struct.calcsize(f"<{kind}")
        self.at += self.fitting(n, width) * width
        return Long(n) if n > self.most else list(struct.unpack_from(f"<{n}{kind}", self.view, start))

    def _texts(self, n: int) -> Any:
        length = struct.Struct("<Q").unpack_from
        at, view, kept = self.at, self.view, n <= self.most
        found = []
        for _ in range(n):
            if at + 8 > len(view):
                raise ValueError("it ends within its header")
            end = at + 8 + length(view, at)[0]
            if end > len(view):
                raise ValueError(f"it declares a text up to byte {end:,}, beyond its end")
            if kept:
                found.append(_text(view, at + 8, end))  # strictly: two damaged tokens would be one otherwise
            at = end
        self.at = at
        return found if kept else Long(n)


def _text(view: mmap.mmap, start: int, end: int) -> str:
    try:
        return view[start:end].decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"the text at byte {start:,} is not in UTF-8") from error


def own_pairs(values: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """Return the values of the keys that begin with the architecture's name. The result's keys lack this prefix."""
    prefix = f"{architecture}."
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
