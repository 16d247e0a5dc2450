"""The grouped low-rank product in plain torch: the specification. Products in x's dtype, which must be A's and B's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def grouped_forward(
    x: Tensor, a_list: Sequence[Tensor], b_list: Sequence[Tensor], scales: Sequence[float], row_to_adapter: Tensor
) -> Tensor:
    y = x.new_zeros(x.shape[0], b_list[0].shape[0])
    for index, (a, b, scale) in enumerate(zip(a_list, b_list, scales, strict=True)):
        rows = (row_to_adapter == index).nonzero()[:, 0]
        y[rows] = x[rows] @ a.T @ (scale * b).T
    return y


def grouped_backward(
    dy: Tensor,
    x: Tensor,
    a_list: Sequence[Tensor],
    b_list: Sequence[Tensor],
    scales: Sequence[float],
    row_to_adapter: Tensor,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    dx = torch.zeros_like(x)
    das, dbs = [], []
    for index, (a, b, scale) in enumerate(zip(a_list, b_list, scales, strict=True)):
        rows = (row_to_adapter == index).nonzero()[:, 0]
        du = dy[rows] @ (scale * b)
        dx[rows] = du @ a
        das.append(du.T @ x[rows])
        dbs.append(scale * (dy[rows].T @ (x[rows] @ a.T)))
    return dx, das, dbs
