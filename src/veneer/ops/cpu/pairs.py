"""Low-rank pairs of many versions by csrc/pairs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from veneer.ops.cpu.module import DTYPES, kernels
from veneer.ops.memory import address
from veneer.ops.pairs import Factor, Segments


def pack(factors: Sequence[Factor]) -> None:
    table, scales, read = list[int](), list[float](), list[Tensor]()
    for rows, scale, panels, o, depth, first in factors:
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        place = (address(panels), o, depth, DTYPES[panels.dtype], first)
        table += (address(rows), rows.stride(0), DTYPES[rows.dtype], *rows.shape, *place)
        scales.append(scale)
        read.append(rows)  # alive until they have been read
    kernels().pairs_pack(table, scales)


def add(x: Tensor, segments: Segments, ys: Sequence[Tensor]) -> None:
    x = x if x.stride(1) == 1 else x.contiguous()
    pairs, table = segments.pairs, segments.table
    kernels().pairs_add(
        DTYPES[pairs.dtype],
        DTYPES[x.dtype],
        DTYPES[ys[0].dtype],
        pairs.in_features,
        pairs.out_features,
        address(table),
        table.shape[0],
        address(x),
        x.stride(0),
        [number for y in ys for number in (address(y), y.stride(0))],
    )
