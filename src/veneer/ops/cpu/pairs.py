"""Low-rank pairs of many versions by csrc/pairs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from veneer.ops.cpu.module import DTYPES, kernels
from veneer.ops.memory import address
from veneer.ops.pairs import Segment


def add(x: Tensor, segments: Sequence[Segment], ys: Sequence[Tensor]) -> None:
    x = x if x.stride(1) == 1 else x.contiguous()
    first = segments[0].pairs
    kernels().pairs_add(
        DTYPES[first.dtype],
        DTYPES[x.dtype],
        DTYPES[ys[0].dtype],
        first.in_features,
        first.out_features,
        [
            number
            for pairs, start, stop in segments
            if start < stop
            for number in (address(pairs.factors), start, stop, *pairs.ranks)
        ],
        address(x),
        x.stride(0),
        [number for y in ys for number in (address(y), y.stride(0))],
    )
