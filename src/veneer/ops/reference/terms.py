"""Packed terms in plain torch, as matrices: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.core.groups import block_diagonal
from veneer.errors import ShapeError
from veneer.ops.packed import BLOCK, DEPTH_UNIT, PackedWeight
from veneer.ops.terms import PADDING, PackedTerm


def apply(term: PackedTerm, x: Tensor, y: Tensor, add: bool) -> None:
    mapped = x.float() @ dense(term).T
    y.copy_(y.float() + mapped if add else mapped)


def dense(term: PackedTerm) -> Tensor:
    """Return the matrix (o, i) in float32."""
    sizes, values, index = term.sizes, term.values, term.index
    if term.kind == "blocks":
        k, b = sizes
        return block_diagonal(values[..., :b].mT.reshape(k * b, b), k)
    if term.kind == "sparse" and index is not None:
        o, i = sizes
        starts, columns = index[: o + 1], index[o + 1 :]
        rows = torch.repeat_interleave(torch.arange(o, device=values.device), (starts[1:] - starts[:-1]).long())
        return values.new_zeros(o, i).index_put_((rows, columns.long()), values)
    if term.kind == "kronecker":
        o1, i1, o2, i2 = sizes
        first = values[: o1 * i1].view(o1, i1)
        second = values[o1 * i1 + -(o1 * i1) % PADDING :].view(i2, -1)[:, :o2].T
        return torch.kron(first, second.contiguous())
    if term.kind != "circulant":
        raise ShapeError(f"a {term.kind} term is no matrix by itself: `times_weight` makes one of it")
    m, n, b = sizes
    places = (torch.arange(b)[:, None] - torch.arange(b)) % b  # row p, column j: at p - j, counted backwards
    return values[..., :b][..., places.to(values.device)].transpose(1, 2).reshape(m * b, n * b)


def make(term: PackedTerm, weight: PackedWeight) -> Tensor:
    """Return the panels of ``W ⊙ (B A)``."""
    o, i, r = term.sizes
    depth = i + -i % DEPTH_UNIT
    a, b = term.values[: r * depth].view(r, depth)[:, :i], term.values[r * depth :].view(-1, r, BLOCK)
    factors = b.mT.reshape(-1, r)[:o] @ a
    return PackedWeight.pack((weight.dense().float() * factors).to(weight.dtype)).panels
