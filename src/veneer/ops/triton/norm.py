"""RMSNorm and LayerNorm in Triton: one program a row; statistics in float32.

The gradients of weight and bias are summed row by row in the registers of a few programs, and over programs by torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from veneer.ops.reference import norm as reference
from veneer.ops.rows import same_dtype, with_rows
from veneer.ops.triton.launch import LONGEST_ROW, block, is_served, launch, processors, warps


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    if not _fits(x, weight):
        return reference.rms_norm_forward(x, weight, eps, offset)
    y, _, rstd = _forward(x, weight, None, eps, offset)
    return y, rstd


def layer_norm_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    if not _fits(x, weight, bias):
        return reference.layer_norm_forward(x, weight, bias, eps)
    return _forward(x, weight, bias, eps, 0.0)


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, weight_grad: bool, added: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    if not _fits(x, weight):
        return reference.rms_norm_backward(dy, x, weight, rstd, offset, weight_grad, added)
    dx, dweight, _ = _backward(dy, x, (weight, offset), (None, rstd), weight_grad, added)
    return dx, dweight


def layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, weight_grad: bool, added: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if not _fits(x, weight):
        return reference.layer_norm_backward(dy, x, weight, mean, rstd, weight_grad, added)
    return _backward(dy, x, (weight, 0.0), (mean, rstd), weight_grad, added)


def _fits(x: Tensor, *others: Tensor) -> bool:
    return is_served(x, *others) and x.shape[-1] <= LONGEST_ROW


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows, weight = with_rows(x), weight.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = torch.empty(2, *x.shape[:-1], dtype=torch.float32, device=x.device)
    n, d = rows.shape
    size = block(d)
    vectors = weight, weight if bias is None else bias.contiguous()
    centred = bias is not None
    args = rows, rows.stride(0), *vectors, y, mean, rstd, d, eps, offset
    launch(_forward_kernel, (n,), *args, CENTRED=centred, BLOCK=size, num_warps=warps(size))
    return y, mean, rstd


def _backward(
    dy: Tensor,
    x: Tensor,
    weight_and_offset: tuple[Tensor, float],
    statistics: tuple[Tensor | None, Tensor],
    weight_grad: bool,
    added: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    rows, dy_rows = with_rows(x), with_rows(same_dtype(dy, x))
    (weight, offset), (mean, rstd) = weight_and_offset, statistics
    n, d = rows.shape
    programs = min(n, 2 * processors(x)) if weight_grad else n
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    beside = rows if added is None else with_rows(added)
    sums = torch.empty(programs if weight_grad else 0, 2, d, dtype=torch.float32, device=x.device)
    size = block(d)
    apart = (part for t in (dy_rows, rows, beside) for part in (t, t.stride(0)))
    given = *apart, weight.contiguous(), rstd if mean is None else mean, rstd
    forms = {"CENTRED": mean is not None, "ADDED": added is not None, "WEIGHT_GRAD": weight_grad, "BLOCK": size}
    launch(_backward_kernel, (programs,), *given, dx, sums, n, d, offset, **forms, num_warps=warps(size))
    if not weight_grad:
        return dx, None, None
    dweight, dbias = sums.sum(0).to(weight.dtype)
    return dx, dweight, dbias


@triton.jit
def _forward_kernel(
    x,
    x_stride,
    weight,
    bias,
    y,
    mean,
    rstd,
    d,
    eps,
    offset,
    CENTRED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < d
    values = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        centre = tl.sum(values, axis=0) / d
        tl.store(mean + row, centre)
        values = tl.where(inside, values - centre, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(values * values, axis=0) / d + eps)
    tl.store(rstd + row, inverse)
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32) + offset
    out = values * inverse * scale
    if CENTRED:
        out += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * d + columns, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    dy,
    dy_stride,
    x,
    x_stride,
    added,
    added_stride,
    weight,
    mean,
    rstd,
    dx,
    sums,
    n,
    d,
    offset,
    CENTRED: tl.constexpr,
    ADDED: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < d
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32) + offset
    dweight = tl.zeros([BLOCK], tl.float32)
    dbias = tl.zeros([BLOCK], tl.float32)
    for row in range(program, n, tl.num_programs(0)):
        gradient = tl.load(dy + row * dy_stride + columns, mask=inside, other=0.0).to(tl.float32)
        values = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(rstd + row)
        if CENTRED:
            values = tl.where(inside, values - tl.load(mean + row), 0.0)
        normed = values * inverse
        dnormed = gradient * scale
        out = dnormed - normed * (tl.sum(dnormed * normed, axis=0) / d)
        if CENTRED:
            out -= tl.sum(tl.where(inside, dnormed, 0.0), axis=0) / d
        out *= inverse
        if ADDED:
            out += tl.load(added + row * added_stride + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + row * d + columns, out.to(dx.dtype.element_ty), mask=inside)
        if WEIGHT_GRAD:
            dweight += gradient * normed
            dbias += gradient
    if WEIGHT_GRAD:
        place = sums + program * 2 * d + columns
        tl.store(place, dweight, mask=inside)
        tl.store(place + d, dbias, mask=inside)
