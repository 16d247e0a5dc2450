"""The grouped low-rank product in plain torch: the specification. Sums in at least float32, rounded once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from veneer.ops.grouped_low_rank import LowRankGroup


def forward(x: Tensor, group: LowRankGroup, onto: Tensor | None) -> Tensor:
    """``onto`` (None is zero, in x's dtype) plus each row's product."""
    y = x.new_zeros(x.shape[0], group.out_features) if onto is None else onto.clone()
    for rows, a, b, _ in _parts(x, group):
        part = x[rows].to(a.dtype) @ a.T @ b.T
        y[rows] = (y[rows] + part).to(y.dtype)
    return y


def backward(
    dy: Tensor, x: Tensor, group: LowRankGroup, input_grad: bool
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """Gradients in x (None where not asked for), and in every a and b in at least float32."""
    dx = torch.zeros_like(x) if input_grad else None
    das, dbs = [], []
    for rows, a, b, scale in _parts(x, group):
        own_x, own_dy = x[rows].to(a.dtype), dy[rows].to(a.dtype)
        du = own_dy @ b
        das.append(du.T @ own_x)
        dbs.append(scale * (own_dy.T @ (own_x @ a.T)))
        if dx is not None:
            dx[rows] = (du @ a).to(dx.dtype)
    return dx, das, dbs


def _parts(x: Tensor, group: LowRankGroup) -> Iterator[tuple[Tensor, Tensor, Tensor, float]]:
    """Of each adapter: its rows, a and scale * b in at least float32, and scale."""
    for index, (a, b, scale) in enumerate(zip(group.a, group.b, group.scales, strict=True)):
        wide = torch.promote_types(torch.promote_types(x.dtype, a.dtype), torch.float32)
        rows = (group.row_to_adapter == index).nonzero()[:, 0]
        yield rows, a.to(wide), b.to(wide) * scale, scale
