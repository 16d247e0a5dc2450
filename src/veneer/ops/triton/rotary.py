"""Rotary embedding in Triton: one program rotates a few heads of one token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from veneer.ops.reference import rotary as reference
from veneer.ops.triton.launch import block, is_served, launch

_MOST_HEADS = 16


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, in_place: bool, inverse: bool) -> Tensor:
    if not is_served(x):
        return reference.rotate(x, cos, sin, interleaved, in_place, inverse)
    batch, n_heads, t, d = x.shape
    out = x if in_place else torch.empty_like(x)
    half, heads = cos.shape[2], block(n_heads, most=_MOST_HEADS)
    rest = 0 if in_place or d == 2 * half else block(d - 2 * half)
    table = [part for t in (cos, sin) for part in (t, 0 if t.shape[0] == 1 else t.stride(0), *t.stride()[1:])]
    forms = {"INTERLEAVED": interleaved, "INVERSE": inverse, "HEADS": heads, "HALF": block(half), "REST": rest}
    grid = batch * t, triton.cdiv(n_heads, heads)
    launch(_kernel, grid, x, *x.stride(), out, *out.stride(), *table, n_heads, t, d, half, **forms)
    return out


@triton.jit
def _kernel(
    x,
    x_batch,
    x_head,
    x_token,
    x_feature,
    out,
    out_batch,
    out_head,
    out_token,
    out_feature,
    cos,
    cos_batch,
    cos_token,
    cos_pair,
    sin,
    sin_batch,
    sin_token,
    sin_pair,
    n_heads,
    t,
    d,
    half,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // t, row % t
    heads = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    pairs = tl.arange(0, HALF)
    cos_at = cos_batch * batch + cos_token * token + cos_pair * pairs
    sin_at = sin_batch * batch + sin_token * token + sin_pair * pairs
    c = tl.load(cos + cos_at, mask=pairs < half, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + sin_at, mask=pairs < half, other=0.0).to(tl.float32)[None, :]
    if INVERSE:
        s = -s
    if INTERLEAVED:
        first = 2 * pairs[None, :]
        second = first + 1
    else:
        first = pairs[None, :]
        second = first + half
    inside = (heads < n_heads) & (pairs[None, :] < half)
    source = x + batch * x_batch + token * x_token + heads * x_head
    target = out + batch * out_batch + token * out_token + heads * out_head
    x1 = tl.load(source + first * x_feature, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(source + second * x_feature, mask=inside, other=0.0).to(tl.float32)
    dtype = out.dtype.element_ty
    tl.store(target + first * out_feature, (x1 * c - x2 * s).to(dtype), mask=inside)
    tl.store(target + second * out_feature, (x2 * c + x1 * s).to(dtype), mask=inside)
    if REST > 0:
        after = 2 * half + tl.arange(0, REST)[None, :]
        inside = (heads < n_heads) & (after < d)
        tl.store(target + after * out_feature, tl.load(source + after * x_feature, mask=inside), mask=inside)
