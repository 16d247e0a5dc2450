"""Mixed batches: rows that carry different records, of different methods, in one pass over the shared frozen weight."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veneer.core.frozen import FrozenWeight
from veneer.core.linear import lowrank, scaled
from veneer.core.records import LinearDelta
from veneer.errors import ShapeError

AddLowrank = Callable[[Tensor, Tensor, Sequence[LinearDelta], Tensor], Tensor]
"""``(y, x, deltas, row_index)`` to y with ``scale B A x`` of each row's record added, in y's dtype or a wider one."""


def add_lowrank(y: Tensor, x: Tensor, deltas: Sequence[LinearDelta], row_index: Tensor) -> Tensor:
    """The low-rank parts one record after the other, each on its rows together."""
    for index, delta in enumerate(deltas):
        rows = (row_index == index).nonzero().squeeze(1)
        if delta.a is not None and delta.b is not None and rows.numel():
            part = lowrank(x[rows], delta.a, delta.b) * delta.scale
            wide = torch.promote_types(y.dtype, part.dtype)
            y = y.to(wide).index_add(0, rows, part.to(wide))
    return y


def apply_linear_rows(
    deltas: Sequence[LinearDelta],
    row_index: Int[Tensor, " n"],
    x: Float[Tensor, "rows *batch i"],
    weight: FrozenWeight,
    bias: Float[Tensor, " o"] | None = None,
    *,
    lowrank_input: Float[Tensor, "rows *batch i"] | None = None,
    add: AddLowrank = add_lowrank,
) -> Float[Tensor, "rows *batch o"]:
    """`core.linear.apply_linear` with record ``deltas[row_index[n]]`` on row n of x; ``LinearDelta()`` is the base.

    The frozen weight is read once for all rows; ``add`` adds the low-rank parts. ``lowrank_input`` stands in for x in
    front of A alone, where dropout acts.

    Raises ShapeError where ``row_index`` has not one entry per row, or names no record.
    """
    row_index = _checked(row_index, len(deltas), x)
    in_scale = _per_row([d.in_scale for d in deltas], row_index, x, neutral=1.0)
    base_input = scaled(x, in_scale)
    base = weight.matmul(base_input)
    source = base_input if lowrank_input is None else scaled(lowrank_input, in_scale)
    y = add(base if bias is None and _only_lowrank(deltas) else _widened(base, deltas), source, deltas, row_index)
    out_scale = _per_row([d.out_scale for d in deltas], row_index, x, neutral=1.0)
    y = y if out_scale is None else y * out_scale
    offset = _per_row([bias if d.bias is None else d.bias for d in deltas], row_index, x, neutral=0.0)
    return (y if offset is None else y + offset).to(base.dtype)


def _only_lowrank(deltas: Sequence[LinearDelta]) -> bool:
    """Whether nothing follows the low-rank parts, so that they may be rounded as they are added."""
    return all(d.out_scale is None and d.bias is None for d in deltas)


def _widened(y: Tensor, deltas: Sequence[LinearDelta]) -> Tensor:
    dtypes = [d.a.dtype for d in deltas if d.a is not None]
    return y.to(functools.reduce(torch.promote_types, dtypes, y.dtype))


def leading_rows(
    given: Sequence[Float[Tensor, "_ *shape"]], row_index: Int[Tensor, " rows"], n: int
) -> Float[Tensor, "rows n *shape"]:
    """Row by row one of ``given``, counted from 1, with zeros in front up to n along its first axis; 0 is all zeros."""
    filled = [torch.cat([x.new_zeros(n - x.shape[0], *x.shape[1:]), x]) for x in given]
    return torch.stack([torch.zeros_like(filled[0]), *filled])[row_index.to(filled[0].device)]


def _per_row(vectors: Sequence[Tensor | None], row_index: Tensor, x: Tensor, neutral: float) -> Tensor | None:
    """The vector of each row's record, (rows, 1…, features), ``neutral`` where it has none; None where none has one."""
    given = [v for v in vectors if v is not None]
    if not given:
        return None
    filler = torch.full_like(given[0], neutral)
    # cat, not stack: it promotes a 16-bit bias beside one in float32
    table = torch.cat([(filler if v is None else v)[None] for v in vectors])
    return table[row_index].view(len(row_index), *[1] * (x.dim() - 2), -1)


def _checked(row_index: Tensor, n_deltas: int, x: Tensor) -> Tensor:
    """The index on x's device."""
    if row_index.shape != x.shape[:1]:
        raise ShapeError(
            f"row_index has shape {tuple(row_index.shape)} beside an x of shape {tuple(x.shape)}: "
            "give one record index per row of x"
        )
    if row_index.numel() and not 0 <= int(row_index.min()) <= int(row_index.max()) < n_deltas:
        raise ShapeError(f"row_index holds {sorted(set(row_index.tolist()))}; there are records 0 to {n_deltas - 1}")
    return row_index.to(x.device)
