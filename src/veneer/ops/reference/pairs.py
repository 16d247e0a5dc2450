"""Low-rank pairs of many versions in plain torch: the specification of their layout, and of what is added."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from veneer.ops.packed import BLOCK
from veneer.ops.pairs import PackedPairs, Segments, filled
from veneer.ops.reference.packed import unpack


def add(x: Tensor, segments: Segments, ys: Sequence[Tensor]) -> None:
    for pairs, start, stop in segments.parts:
        rows = slice(start, stop)
        for y, (a, b) in zip(ys, unpacked(pairs), strict=True):
            y[rows] = y[rows].float() + x[rows].float() @ a.T @ b.T


def unpacked(pairs: PackedPairs) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each layer a and ``scale * b``, in float32."""
    in_rows = [filled(rank, pairs.dtype) for rank in pairs.ranks]
    joined, rest = _first(pairs.factors, (sum(in_rows), pairs.in_features))
    for o, rank, taken in zip(pairs.out_features, pairs.ranks, in_rows, strict=True):
        b, rest = _first(rest, (o, rank)) if rank else (joined.new_empty(o, 0), rest)
        yield joined[:rank].float(), b.float()
        joined = joined[taken:]


def _first(panels: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The first matrix of those that follow each other, and the others."""
    o, i = shape
    depth = filled(i, panels.dtype)
    size = (o + -o % BLOCK) * depth
    return unpack(panels[:size], shape, depth), panels[size:]
