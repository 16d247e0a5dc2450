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
