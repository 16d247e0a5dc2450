"""Row-wise int8 in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int8
from torch import Tensor

from veneer.ops.dispatch import MOST_ROWS_BY_CODES, slow_products
from veneer.ops.reference.int8 import INVERSE_127
from veneer.ops.triton.launch import block, launch, launch_exact, warps

_WIDEST = 2048
_INVERSE_127 = tl.constexpr(INVERSE_127)
_ROUNDS = tl.constexpr(12582912.0)  # 1.5 * 2**23: added and taken off, it rounds to whole numbers, ties to even


def quantize_int8(w: Float[Tensor, "o i"]) -> tuple[Int8[Tensor, "o i"], Float32[Tensor, " o"]]:
    o, i = w.shape
    codes = torch.empty(o, i, dtype=torch.int8, device=w.device)
    absmax = torch.empty(o, dtype=torch.float32, device=w.device)
    size = block(i, most=_WIDEST)
    launch_exact(_quantize_kernel, (o,), w, codes, absmax, i, BLOCK=size, num_warps=warps(size))
    return codes, absmax


def dequantize_int8(
    codes: Int8[Tensor, "o i"], absmax: Float32[Tensor, " o"], dtype: torch.dtype
) -> Float[Tensor, "o i"]:
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    o, i = codes.shape
    size = block(i, most=_WIDEST)
    grid = o, triton.cdiv(i, size)
    launch_exact(_dequantize_kernel, grid, codes, absmax, out, i, BLOCK=size, num_warps=warps(size))
    return out


def matmul_int8(
    x: Float[Tensor, "rows i"], codes: Int8[Tensor, "o i"], absmax: Float32[Tensor, " o"]
) -> Float[Tensor, "rows o"]:
    if not 0 < len(x) <= MOST_ROWS_BY_CODES or slow_products():
        return x @ dequantize_int8(codes, absmax, x.dtype).T
    o, i = codes.shape
    return _product(x, (codes, absmax), o, i, transposed=False)


def matmul_t_int8(
    dy: Float[Tensor, "rows o"], codes: Int8[Tensor, "o i"], absmax: Float32[Tensor, " o"]
) -> Float[Tensor, "rows i"]:
    if not 0 < len(dy) <= MOST_ROWS_BY_CODES or slow_products():
        return dy @ dequantize_int8(codes, absmax, dy.dtype)
    o, i = codes.shape
    return _product(dy, (codes, absmax), i, o, transposed=True)


def _product(x: Tensor, weight: tuple[Tensor, Tensor], wide: int, deep: int, transposed: bool) -> Tensor:
    """Multiply ``x`` by the weight: ``wide`` results a row, each a sum of ``deep`` products."""
    out = x.new_empty(len(x), wide)
    forms = {"TRANSPOSED": transposed, "ROWS": MOST_ROWS_BY_CODES, "WIDE": 32, "DEEP": 128}
    launch(_product_kernel, (triton.cdiv(wide, 32),), x, *weight, out, len(x), wide, deep, **forms)
    return out


@triton.jit
def _decoded(codes, scale):
    return codes.to(tl.float32) * scale * _INVERSE_127


@triton.jit
def _quantize_kernel(w, codes, absmax, i, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane_most = tl.zeros([BLOCK], tl.float32)
    lane_unsure = tl.zeros([BLOCK], tl.float32)
    for first in range(0, i, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        values = tl.load(w + row * i + columns, mask=columns < i, other=0.0).to(tl.float32)
        lane_most = tl.maximum(lane_most, tl.abs(values))
        lane_unsure += values * 0.0  # a maximum may pass NaN over: a sum does not
    most = tl.max(lane_most, axis=0)
    most = tl.where(tl.sum(lane_unsure, axis=0) == 0.0, most, float("nan"))
    tl.store(absmax + row, most)
    # As the reference's 127 / absmax is computed: the reciprocal, rounded, times 127.
    inverse = tl.where(most > 0.0, tl.div_rn(1.0, tl.where(most > 0.0, most, 1.0)) * 127.0, 0.0)
    for first in range(0, i, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        values = tl.load(w + row * i + columns, mask=columns < i, other=0.0).to(tl.float32)
        rounded = (values * inverse + _ROUNDS) - _ROUNDS
        tl.store(codes + row * i + columns, rounded.to(tl.int8), mask=columns < i)


@triton.jit
def _dequantize_kernel(codes, absmax, out, i, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = _decoded(tl.load(codes + row * i + columns, mask=columns < i, other=0), tl.load(absmax + row))
    tl.store(out + row * i + columns, values.to(out.dtype.element_ty), mask=columns < i)


@triton.jit
def _product_kernel(
    x,
    codes,
    absmax,
    out,
    n_rows,
    wide,
    deep,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    DEEP: tl.constexpr,
):
    """Compute ``x Wᵀ``, or ``x W`` if TRANSPOSED. A program computes a tile of results."""
    rows = tl.arange(0, ROWS)[:, None]
    results = (tl.program_id(0) * WIDE + tl.arange(0, WIDE))[None, :]
    total = tl.zeros([ROWS, WIDE], tl.float32)
    for begin in range(0, deep, DEEP):
        terms = begin + tl.arange(0, DEEP)
        down = terms[:, None]
        inside = (down < deep) & (results < wide)
        if TRANSPOSED:
            place = down.to(tl.int64) * wide + results
            scale = tl.load(absmax + down, mask=down < deep, other=0.0)
        else:
            place = results.to(tl.int64) * deep + down
            scale = tl.load(absmax + results, mask=results < wide, other=0.0)
        given = (rows < n_rows) & (terms < deep)[None, :]
        tile = tl.load(x + rows * deep + terms[None, :], mask=given, other=0.0)
        weight = _decoded(tl.load(codes + place, mask=inside, other=0), scale)
        total = tl.dot(tile, weight.to(tile.dtype), total, input_precision="ieee")
    inside = (rows < n_rows) & (results < wide)
    tl.store(out + rows * wide + results, total.to(out.dtype.element_ty), mask=inside)
