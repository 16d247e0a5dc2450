"""Rotary embedding by csrc/rotary, in float32 and bfloat16; the reference computes other dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.ops.cpu.dtypes import is_served
from veneer.ops.cpu.module import DTYPES, kernels
from veneer.ops.memory import address
from veneer.ops.reference import rotary as reference


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, in_place: bool, inverse: bool) -> Tensor:
    if not is_served(x) or x.stride(-1) != 1 or not x.numel():
        return reference.rotate(x, cos, sin, interleaved, in_place, inverse)
    sin = -sin if inverse else sin
    out = x if in_place else torch.empty_like(x)
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    if out.stride(-1) != 1:  # empty_like does not keep the strides of an overlapping view
        out = torch.empty(x.shape, dtype=x.dtype)
    kernels().rotary_rotate(
        address(x),
        x.stride()[:3],
        address(out),
        out.stride()[:3],
        *x.shape,
        address(cos),
        address(sin),
        0 if cos.shape[0] == 1 else cos.stride(0),
        cos.shape[2],
        DTYPES[x.dtype],
        interleaved,
    )
    return out


def rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> None:
    for x in (q, k):
        rotate(x, cos, sin, interleaved, True, inverse)
