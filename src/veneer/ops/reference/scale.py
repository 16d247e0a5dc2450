"""Columns scaled and shifted in plain torch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(z: Tensor, scale: Tensor | None, bias: Tensor | None, y: Tensor) -> None:
    wide = z.to(_widest(z, scale, bias))
    if scale is not None:
        wide = wide * scale
    y.copy_(wide if bias is None else wide + bias)


def backward(
    dy: Tensor, z: Tensor | None, scale: Tensor | None, dz: Tensor | None, with_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    wide = dy.to(_widest(dy, scale))
    dscale = None if z is None else (wide * z).sum(dim=0)
    dbias = wide.sum(dim=0) if with_bias else None
    if scale is not None and dz is not None:
        dz.copy_(wide * scale)
    return dscale, dbias


def _widest(z: Tensor, *others: Tensor | None) -> torch.dtype:
    dtype = torch.promote_types(z.dtype, torch.float32)
    for other in others:
        dtype = dtype if other is None else torch.promote_types(dtype, other.dtype)
    return dtype
