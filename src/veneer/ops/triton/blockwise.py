"""Blockwise 8-bit codes in Triton: the nearest table value by a search over the midpoints between neighbours."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from veneer.ops.triton.launch import block, launch_exact

_TILE = 4096


def quantize_blockwise(
    flat: Float[Tensor, " n"], code: Float32[Tensor, "256"], block_size: int
) -> tuple[UInt8[Tensor, " n"], Float32[Tensor, " blocks"]]:
    n = len(flat)
    codes = torch.empty(n, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=flat.device)
    width = block(block_size, most=_TILE)
    rows = _TILE // width
    args = flat, midpoints(code), codes, absmax, n, block_size
    launch_exact(_quantize_kernel, (triton.cdiv(len(absmax), rows),), *args, ROWS=rows, WIDTH=width)
    return codes, absmax


def dequantize_blockwise(
    codes: UInt8[Tensor, " n"],
    absmax: Float32[Tensor, " blocks"],
    code: Float32[Tensor, "256"],
    block_size: int,
    dtype: torch.dtype,
    offset: Float32[Tensor, ""] | None,
) -> Float[Tensor, " n"]:
    out = torch.empty(len(codes), dtype=dtype, device=codes.device)
    grid = (triton.cdiv(len(codes), _TILE),)
    launch_exact(_dequantize_kernel, grid, codes, absmax, code, out, offset, len(codes), block_size, BLOCK=_TILE)
    return out


def midpoints(code: Float32[Tensor, "256"]) -> Float32[Tensor, "255"]:
    """Return the midpoints between neighbouring table values; a value above j of them has the nearest code j."""
    return (code[:-1] + code[1:]) / 2


@triton.jit
def nearest(values, midpoints):
    """Return the nearest code of each value: the number of the 255 sorted midpoints below it.

    At a midpoint it is the lower code.
    """
    below = tl.zeros(values.shape, tl.int32)
    for power in tl.static_range(8):
        step = 128 >> power
        below = tl.where(tl.load(midpoints + below + (step - 1)) < values, below + step, below)
    return below


@triton.jit
def scaled(values, most):
    """Return each row's values divided by its largest magnitude; a row of zeros stays unscaled."""
    inverse = tl.where(most > 0.0, tl.div_rn(1.0, tl.where(most > 0.0, most, 1.0)), 0.0)
    return tl.minimum(tl.maximum(values * inverse[:, None], -1.0), 1.0)


@triton.jit
def _quantize_kernel(x, midpoints, codes, absmax, n, block_size, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    start = block[:, None] * block_size
    lane_most = tl.zeros([ROWS, WIDTH], tl.float32)
    lane_unsure = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(0, block_size, WIDTH):
        within = (first + tl.arange(0, WIDTH))[None, :]
        values = tl.load(x + start + within, mask=(within < block_size) & (start + within < n), other=0.0)
        lane_most = tl.maximum(lane_most, tl.abs(values.to(tl.float32)))
        lane_unsure += values.to(tl.float32) * 0.0  # a maximum may pass NaN over: a sum does not
    most = tl.max(lane_most, axis=1)
    most = tl.where(tl.sum(lane_unsure, axis=1) == 0.0, most, float("nan"))
    tl.store(absmax + block, most, mask=block * block_size < n)
    for first in range(0, block_size, WIDTH):
        within = (first + tl.arange(0, WIDTH))[None, :]
        inside = (within < block_size) & (start + within < n)
        values = tl.load(x + start + within, mask=inside, other=0.0).to(tl.float32)
        tl.store(codes + start + within, nearest(scaled(values, most), midpoints).to(tl.uint8), mask=inside)


@triton.jit
def _dequantize_kernel(codes, absmax, table, out, offset, n, block_size, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < n
    code = tl.load(codes + place, mask=inside, other=0).to(tl.int32)
    values = tl.load(table + code) * tl.load(absmax + place // block_size, mask=inside, other=0.0)
    values = values.to(out.dtype.element_ty)
    if offset is not None:
        values = (values.to(tl.float32) + tl.load(offset)).to(out.dtype.element_ty)
    tl.store(out + place, values, mask=inside)
