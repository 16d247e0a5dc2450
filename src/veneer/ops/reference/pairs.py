"""Low-rank pairs of many versions in plain torch: the specification of their layout and their products."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from veneer.ops.activation import KINDS
from veneer.ops.packed import BLOCK
from veneer.ops.pairs import Factor, PackedPairs, Segments, filled
from veneer.ops.reference.activation import activation_forward
from veneer.ops.reference.packed import pack as pack_matrix
from veneer.ops.reference.packed import unpack


def pack(factors: Sequence[Factor]) -> None:
    for rows, scale, panels, o, depth, first in factors:
        n, i = rows.shape
        matrix = unpack(panels, (o, depth), depth)
        matrix[first : first + n, :i] = (rows.float() * scale).to(panels.dtype)
        panels.copy_(pack_matrix(matrix, depth))


def add(x: Tensor, segments: Segments, ys: Sequence[Tensor]) -> None:
    for pairs, start, stop in segments.parts:
        rows = slice(start, stop)
        inner = [x[rows].float() @ a.T for a, _ in unpacked(pairs)]  # before outputs are written, which may be x
        for i, (y, (_, b)) in enumerate(zip(ys, unpacked(pairs), strict=True)):
            if pairs.ranks[i] or pairs.scales_y:
                added = _between(pairs, i, inner[i]) @ b.T
                given = y[rows].float()
                y[rows] = _behind(pairs, i, given + added) if pairs.scales_y else given + _behind(pairs, i, added)


def _between(pairs: PackedPairs, layer: int, u: Tensor) -> Tensor:
    middle = pairs.middle
    if middle is None:
        return u
    places = [filled(rank, pairs.dtype) for rank in pairs.ranks]
    core, bias = (
        None if v is None else torch.split(v, places)[layer][: u.shape[1]] for v in (middle.core, middle.bias)
    )
    u = u if core is None else u * core
    return activated(u if bias is None else u + bias, middle.activation)


def _behind(pairs: PackedPairs, layer: int, y: Tensor) -> Tensor:
    if pairs.middle is None:
        return y
    outs = list(pairs.out_features)
    scale, bias = (None if v is None else torch.split(v, outs)[layer] for v in pairs.middle[3:5])
    y = y if scale is None else y * scale
    return y if bias is None else y + bias


def activated(x: Tensor, kind: str) -> Tensor:
    """Return x after one of `veneer.ops.pairs.ACTIVATIONS`."""
    return activation_forward(x, kind) if kind in KINDS else _OTHERS[kind](x)


_OTHERS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": functional.leaky_relu,
    "identity": torch.clone,
}


def unpacked(pairs: PackedPairs) -> Iterator[tuple[Tensor, Tensor]]:
    """Return a and ``scale * b`` of each layer, in float32."""
    in_rows = [filled(rank, pairs.dtype) for rank in pairs.ranks]
    joined, rest = _first(pairs.factors, (in_rows[0] if pairs.shares_a else sum(in_rows), pairs.in_features))
    for o, rank, taken in zip(pairs.out_features, pairs.ranks, in_rows, strict=True):
        b, rest = _first(rest, (o, rank)) if rank else (joined.new_empty(o, 0), rest)
        yield joined[:rank].float(), b.float()
        joined = joined if pairs.shares_a else joined[taken:]


def _first(panels: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Split off the first of several concatenated matrices; return it and the rest."""
    o, i = shape
    depth = filled(i, panels.dtype)
    size = (o + -o % BLOCK) * depth
    return unpack(panels[:size], shape, depth), panels[size:]
