"""Gated linear units in Triton."""

from __future__ import annotations

from itertools import chain

import torch
import triton
import triton.language as tl
from torch import Tensor

from veneer.ops.reference import glu as reference
from veneer.ops.rows import put_back, same_dtype, with_rows
from veneer.ops.triton.activations import activated
from veneer.ops.triton.launch import block, is_served, launch

_WIDEST = 1024


def glu_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    if not is_served(gate):
        return reference.glu_forward(gate, up, activation)
    h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _run(_forward_kernel, [with_rows(t) for t in (gate, up, h)], activation)
    return h


def glu_backward(
    dh: Tensor, gate: Tensor, up: Tensor, activation: str, owns: tuple[bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    if not is_served(gate):
        return reference.glu_backward(dh, gate, up, activation, owns)
    dh = same_dtype(dh, gate)
    owned = (owns[0], owns[0], owns[1])
    results = [
        own if owns_it else torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        for own, owns_it in zip((gate, up, dh), owned, strict=True)
    ]
    written = [with_rows(t) for t in results]
    _run(_backward_kernel, [with_rows(t) for t in (dh, gate, up)] + written, activation)
    for result, row in zip(results, written, strict=True):
        put_back(row, result)
    return results[0], results[1], results[2]


def clamped_forward(inner: Tensor) -> Tensor:
    if not is_served(inner):
        return reference.clamped_forward(inner)
    h = torch.empty(len(inner), inner.shape[1] // 2, dtype=inner.dtype, device=inner.device)
    _run_clamped(_clamped_forward_kernel, [with_rows(inner), h])
    return h


def clamped_backward(dh: Tensor, inner: Tensor) -> None:
    if not is_served(inner):
        reference.clamped_backward(dh, inner)
        return
    rows = [with_rows(inner), with_rows(dh)]
    _run_clamped(_clamped_backward_kernel, rows)
    for row, given in zip(rows, (inner, dh), strict=True):
        put_back(row, given)


def _run_clamped(kernel: triton.JITFunction, rows: list[Tensor]) -> None:
    n, d = rows[1].shape
    size = block(d, most=_WIDEST)
    places = chain.from_iterable((row, row.stride(0)) for row in rows)
    launch(kernel, (n, triton.cdiv(d, size)), *places, d, BLOCK=size)


@triton.jit
def _clamped(inner, columns, inside):
    """Load gate and up, which alternate, and return both within their bounds, and whether they were within."""
    gate = tl.load(inner + 2 * columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(inner + 2 * columns + 1, mask=inside, other=0.0).to(tl.float32)
    return tl.minimum(gate, 7.0), tl.minimum(tl.maximum(up, -7.0), 7.0), gate <= 7.0, (up <= 7.0) & (up >= -7.0)


@triton.jit
def _clamped_forward_kernel(inner, inner_stride, h, h_stride, d, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < d
    gate, up, _, _ = _clamped(inner + row * inner_stride, columns, inside)
    out = (up + 1.0) * gate * tl.sigmoid(1.702 * gate)
    tl.store(h + row * h_stride + columns, out.to(h.dtype.element_ty), mask=inside)


@triton.jit
def _clamped_backward_kernel(inner, inner_stride, dh, dh_stride, d, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < d
    gate, up, gate_moves, up_moves = _clamped(inner + row * inner_stride, columns, inside)
    gradient = tl.load(dh + row * dh_stride + columns, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(1.702 * gate)
    dgate = gradient * (up + 1.0) * share * (1.0 + 1.702 * gate * (1.0 - share))
    dup = gradient * gate * share
    to = inner + row * inner_stride + 2 * columns
    tl.store(to, tl.where(gate_moves, dgate, 0.0).to(inner.dtype.element_ty), mask=inside)
    tl.store(to + 1, tl.where(up_moves, dup, 0.0).to(inner.dtype.element_ty), mask=inside)
    tl.store(dh + row * dh_stride + columns, ((up + 1.0) * gate * share).to(dh.dtype.element_ty), mask=inside)


def _run(kernel: triton.JITFunction, rows: list[Tensor], activation: str) -> None:
    n, d = rows[0].shape
    size = block(d, most=_WIDEST)
    places = chain.from_iterable((row, row.stride(0)) for row in rows)
    launch(kernel, (n, triton.cdiv(d, size)), *places, d, ACTIVATION=activation, BLOCK=size)


@triton.jit
def _forward_kernel(gate, gate_stride, up, up_stride, h, h_stride, d, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < d
    g = tl.load(gate + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    value, _ = activated(g, ACTIVATION)
    tl.store(h + row * h_stride + columns, (value * u).to(h.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    dh,
    dh_stride,
    gate,
    gate_stride,
    up,
    up_stride,
    dgate,
    dgate_stride,
    dup,
    dup_stride,
    h,
    h_stride,
    d,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < d
    gradient = tl.load(dh + row * dh_stride + columns, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    value, slope = activated(g, ACTIVATION)
    dtype = h.dtype.element_ty
    tl.store(dgate + row * dgate_stride + columns, (gradient * u * slope).to(dtype), mask=inside)
    tl.store(dup + row * dup_stride + columns, (gradient * value).to(dtype), mask=inside)
    tl.store(h + row * h_stride + columns, (value * u).to(dtype), mask=inside)
