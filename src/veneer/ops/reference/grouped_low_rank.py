"""Grouped low-rank product in plain torch: the specification. Sums are in at least float32, rounded once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from veneer.ops.dropout import Mask
from veneer.ops.grouped_low_rank import AdapterRuns, Factors, LowRankGroup


def forward(x: Tensor, groups: Sequence[LowRankGroup], rows: AdapterRuns, ys: Sequence[Tensor]) -> Tensor:
    """Add each row's low-rank product to the output of each layer, in place. Return an empty tensor, because `backward`
    reads nothing else.
    """
    for group, y in zip(groups, ys, strict=True):
        for k, own, a, b, _ in _parts(x, group, rows):
            y[own] = (y[own] + _dropped(x[own], own, group.mask_of(k)).to(a.dtype) @ a.T @ b.T).to(y.dtype)
    return x.new_empty(0)


def backward(
    dys: Sequence[Tensor], x: Tensor, u: Tensor, groups: Sequence[LowRankGroup], rows: AdapterRuns, input_grad: bool
) -> tuple[Tensor | None, list[Factors], list[Factors]]:
    """Return the gradients in x, or None unless ``input_grad``, and in every a and b in at least float32."""
    dx = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) if input_grad else None
    das, dbs = list[Factors](), list[Factors]()
    for group, dy in zip(groups, dys, strict=True):
        da, db = ([None if f is None else _zeros(x, f) for f in factors] for factors in (group.a, group.b))
        for k, own, a, b, scale in _parts(x, group, rows):
            own_x, own_dy = _dropped(x[own], own, group.mask_of(k)).to(a.dtype), dy[own].to(a.dtype)
            du = own_dy @ b
            da[k], db[k] = _sum(da[k], du.T @ own_x), _sum(db[k], scale * (own_dy.T @ (own_x @ a.T)))
            if dx is not None:
                dx[own] += _dropped(du @ a, own, group.mask_of(k))
        das.append(tuple(da))
        dbs.append(tuple(db))
    return None if dx is None else dx.to(x.dtype), das, dbs


def _dropped(part: Tensor, own: slice, mask: Mask | None) -> Tensor:
    """Return ``part``, the rows ``own`` of a batch, with zeros where the batch's mask drops values; unchanged without a
    mask.
    """
    return part if mask is None else mask.drop(part, own, backend="reference")


def _zeros(x: Tensor, factor: Tensor) -> Tensor:
    return torch.zeros_like(factor, dtype=_wide(x, factor))


def _sum(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total + part


def _wide(x: Tensor, factor: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, factor.dtype), torch.float32)


def _parts(x: Tensor, group: LowRankGroup, rows: AdapterRuns) -> Iterator[tuple[int, slice, Tensor, Tensor, float]]:
    """Yield for each run: its adapter, its rows, a and scale * b in at least float32, and the scale."""
    for adapter, start, stop in rows.runs:
        a, b, scale = group.a[adapter], group.b[adapter], group.scales[adapter]
        if a is not None and b is not None:
            wide = _wide(x, a)
            yield adapter, slice(start, stop), a.to(wide), b.to(wide) * scale, scale
