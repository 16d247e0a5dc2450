"""Rotary embedding in Triton: one program rotates a few heads of one token, of queries or of keys."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from veneer.ops.reference import rotary as reference
from veneer.ops.triton.launch import block, is_served, launch

MOST_HEADS = 16  # of a program


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, in_place: bool, inverse: bool) -> Tensor:
    if not is_served(x):
        return reference.rotate(x, cos, sin, interleaved, in_place, inverse)
    out = x if in_place else torch.empty_like(x)
    _run(x, out, None, cos, sin, INTERLEAVED=interleaved, INVERSE=inverse)
    return out


def rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> None:
    if not is_served(q, k):
        reference.rotate_both(q, k, cos, sin, interleaved, inverse)
    else:
        _run(q, q, k, cos, sin, INTERLEAVED=interleaved, INVERSE=inverse)


def _run(x: Tensor, out: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, **forms: Any) -> None:
    """Write the rotated x into ``out``. If ``k`` is given, rotate it in place too."""
    batch, n_heads, t, d = x.shape
    half, heads = cos.shape[2], block(n_heads, most=MOST_HEADS)
    rest = 0 if out is x or d == 2 * half else block(d - 2 * half)
    table = [
        part for each in (cos, sin) for part in (each, 0 if len(each) == 1 else each.stride(0), *each.stride()[1:])
    ]
    keys, n_keys = (x, 0) if k is None else (k, k.shape[1])
    tiles = triton.cdiv(n_heads, heads)
    grid = batch * t, tiles + triton.cdiv(n_keys, heads)
    places = x, *x.stride(), out, *out.stride(), keys, *keys.stride()
    sizes = {"HEADS": heads, "HALF": block(half), "REST": rest}
    launch(_kernel, grid, *places, *table, n_heads, n_keys, t, d, half, **forms, **sizes)


@triton.jit
def pair_at(pairs, half, INTERLEAVED: tl.constexpr):
    """Return the index of the first feature of each pair, and that of the second."""
    if INTERLEAVED:
        first = 2 * pairs
        second = first + 1
    else:
        first = pairs
        second = first + half
    return first, second


@triton.jit
def turn(source, feature, target, target_feature, first, second, c, s, inside):
    """Rotate the feature pairs of some heads, read at ``source``, and write them at ``target``."""
    x1 = tl.load(source + first * feature, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(source + second * feature, mask=inside, other=0.0).to(tl.float32)
    dtype = target.dtype.scalar.element_ty
    tl.store(target + first * target_feature, (x1 * c - x2 * s).to(dtype), mask=inside)
    tl.store(target + second * target_feature, (x2 * c + x1 * s).to(dtype), mask=inside)


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
    k,
    k_batch,
    k_head,
    k_token,
    k_feature,
    cos,
    cos_batch,
    cos_token,
    cos_pair,
    sin,
    sin_batch,
    sin_token,
    sin_pair,
    n_heads,
    n_keys,
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
    pairs = tl.arange(0, HALF)
    c = tl.load(cos + cos_batch * batch + cos_token * token + cos_pair * pairs, mask=pairs < half, other=0.0)
    s = tl.load(sin + sin_batch * batch + sin_token * token + sin_pair * pairs, mask=pairs < half, other=0.0)
    c, s = c.to(tl.float32)[None, :], s.to(tl.float32)[None, :]
    if INVERSE:
        s = -s
    first, second = pair_at(pairs[None, :], half, INTERLEAVED)
    tile, tiles = tl.program_id(1), tl.cdiv(n_heads, HEADS)
    if tile < tiles:
        heads = (tile * HEADS + tl.arange(0, HEADS))[:, None]
        inside = (heads < n_heads) & (pairs[None, :] < half)
        source = x + batch * x_batch + token * x_token + heads * x_head
        target = out + batch * out_batch + token * out_token + heads * out_head
        turn(source, x_feature, target, out_feature, first, second, c, s, inside)
        if REST > 0:
            after = 2 * half + tl.arange(0, REST)[None, :]
            behind = (heads < n_heads) & (after < d)
            tl.store(target + after * out_feature, tl.load(source + after * x_feature, mask=behind), mask=behind)
    else:
        heads = ((tile - tiles) * HEADS + tl.arange(0, HEADS))[:, None]
        inside = (heads < n_keys) & (pairs[None, :] < half)
        keys = k + batch * k_batch + token * k_token + heads * k_head
        turn(keys, k_feature, keys, k_feature, first, second, c, s, inside)
