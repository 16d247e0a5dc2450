"""Norms of the rows of an updated weight in plain torch: the specification, and what a CPU runs."""

from __future__ import annotations

from torch import Tensor


def row_norms(row_sq: Tensor, wa: Tensor, a: Tensor, b: Tensor, scale: float, least: float) -> Tensor:
    cross = (wa.to(b.dtype).T * b).sum(dim=1)
    square = ((b @ (a @ a.T)) * b).sum(dim=1)
    total = row_sq.to(b.dtype) + 2 * scale * cross + scale**2 * square
    return total.clamp_min(0).sqrt().clamp_min(least)
