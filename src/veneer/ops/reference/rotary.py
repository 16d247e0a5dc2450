"""Rotary position embedding in plain torch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, in_place: bool, inverse: bool) -> Tensor:
    sin = -sin if inverse else sin
    wide = torch.promote_types(x.dtype, torch.float32)
    half = cos.shape[-1]
    c, s = cos.to(wide).unsqueeze(1), sin.to(wide).unsqueeze(1)
    first = (slice(0, 2 * half, 2) if interleaved else slice(0, half),)
    second = (slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half),)
    x1, x2 = x[(..., *first)].to(wide), x[(..., *second)].to(wide)
    out = x if in_place else x.clone()
    turned = (x1 * c - x2 * s, x2 * c + x1 * s)  # both before either overwrites x
    out[(..., *first)], out[(..., *second)] = (t.to(x.dtype) for t in turned)
    return out


def rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> None:
    for x in (q, k):
        rotate(x, cos, sin, interleaved, True, inverse)
