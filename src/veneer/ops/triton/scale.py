"""Columns scaled and shifted in Triton.

In the backward pass a program takes some columns of some rows. If rows are split over programs, their partial sums are
added in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from veneer.ops.reference import scale as reference
from veneer.ops.rows import put_back, with_rows
from veneer.ops.triton.launch import block, is_served, launch, processors

_WIDEST = 1024
_COLUMNS, _ROWS = 32, 64  # of a program's tile, backward


def forward(z: Tensor, scale: Tensor | None, bias: Tensor | None, y: Tensor) -> None:
    if not _fits(z, scale, bias):
        return reference.forward(z, scale, bias, y)
    rows, written = with_rows(z), with_rows(y)
    n, d = rows.shape
    size = block(d, most=_WIDEST)
    vectors = (rows if vector is None else vector.contiguous() for vector in (scale, bias))
    forms = {"SCALED": scale is not None, "SHIFTED": bias is not None, "BLOCK": size}
    places = (rows, rows.stride(0), *vectors, written, written.stride(0), d)
    launch(_forward_kernel, (n, triton.cdiv(d, size)), *places, **forms)
    put_back(written, y)
    return None


def backward(
    dy: Tensor, z: Tensor | None, scale: Tensor | None, dz: Tensor | None, with_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    if not _fits(dy, scale):
        return reference.backward(dy, z, scale, dz, with_bias)
    n, d = dy.shape
    rows = with_rows(dy)
    seen, written = (rows if given is None else with_rows(given) for given in (z, dz))
    tiles = triton.cdiv(d, _COLUMNS)
    height = _ROWS * triton.cdiv(n, _ROWS * max(1, 2 * processors(dy) // tiles))
    parts = triton.cdiv(n, height)
    sums = torch.empty(parts, 2, d, dtype=torch.float32, device=dy.device)
    forms = {"SCALED": scale is not None, "SCALE_GRAD": z is not None, "BIAS_GRAD": with_bias}
    factor = rows if scale is None else scale.contiguous()
    places = (*(part for t in (rows, seen, written) for part in (t, t.stride(0))), factor, sums, n, d, height)
    launch(_backward_kernel, (tiles, parts), *places, **forms, COLUMNS=_COLUMNS, ROWS=_ROWS)
    if dz is not None:
        put_back(written, dz)
    if z is None and not with_bias:
        return None, None
    dscale, dbias = sums[0] if parts == 1 else sums.sum(0)
    return None if z is None else dscale, dbias if with_bias else None


def _fits(x: Tensor, *vectors: Tensor | None) -> bool:
    return is_served(x, *(vector for vector in vectors if vector is not None))


@triton.jit
def _forward_kernel(
    z, z_stride, scale, bias, y, y_stride, d, SCALED: tl.constexpr, SHIFTED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < d
    out = tl.load(z + row * z_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        out *= tl.load(scale + columns, mask=inside, other=0.0).to(tl.float32)
    if SHIFTED:
        out += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * y_stride + columns, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    dy,
    dy_stride,
    z,
    z_stride,
    dz,
    dz_stride,
    scale,
    sums,
    n,
    d,
    height,
    SCALED: tl.constexpr,
    SCALE_GRAD: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    within = columns < d
    scale_sum = tl.zeros((COLUMNS,), dtype=tl.float32)
    bias_sum = tl.zeros((COLUMNS,), dtype=tl.float32)
    if SCALED:
        factor = tl.load(scale + columns, mask=within, other=0.0).to(tl.float32)
    part = tl.program_id(1)
    for first in range(part * height, tl.minimum(n, (part + 1) * height), ROWS):
        rows = (first + tl.arange(0, ROWS)).to(tl.int64)
        inside = (rows < n)[:, None] & within[None, :]
        gradient = tl.load(dy + rows[:, None] * dy_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        if SCALE_GRAD:
            values = tl.load(z + rows[:, None] * z_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
            scale_sum += tl.sum(gradient * values, axis=0)
        if BIAS_GRAD:
            bias_sum += tl.sum(gradient, axis=0)
        if SCALED:
            out = (gradient * factor[None, :]).to(dz.dtype.element_ty)
            tl.store(dz + rows[:, None] * dz_stride + columns[None, :], out, mask=inside)
    own = sums + part.to(tl.int64) * 2 * d
    if SCALE_GRAD:
        tl.store(own + columns, scale_sum, mask=within)
    if BIAS_GRAD:
        tl.store(own + d + columns, bias_sum, mask=within)
