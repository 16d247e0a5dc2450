"""8-bit AdamW in Triton: moments are dequantized, updated, used and quantized in registers, a few blocks a program."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from veneer.ops.adamw import BLOCK_SIZE, AdamWStep, Moment8bit
from veneer.ops.blockwise import dynamic_map
from veneer.ops.reference import adamw as reference
from veneer.ops.triton.blockwise import midpoints, nearest, scaled
from veneer.ops.triton.launch import is_served, launch_exact

_ROWS = 4


@torch.no_grad()
def adamw_8bit_(param: Tensor, grad: Tensor, moments: tuple[Moment8bit, Moment8bit], hyper: AdamWStep) -> Tensor | None:
    parts = [t for moment in moments for t in (moment.codes, moment.absmax)]
    if not is_served(param, grad) or not all(t.is_contiguous() for t in (param, *parts)):
        reference.adamw_8bit_(param, grad, moments, hyper)
        return None
    broken = torch.zeros(1, dtype=torch.int32, device=param.device)
    tables = [t for signed in (True, False) for t in _tables(signed, param.device)]
    grid = (triton.cdiv(len(moments[0].absmax), _ROWS),)
    args = param, grad.contiguous(), *parts, *tables, broken, param.numel(), *_numbers(hyper)
    launch_exact(_kernel, grid, *args, ROWS=_ROWS, WIDTH=BLOCK_SIZE)
    return broken


def _numbers(hyper: AdamWStep) -> tuple[float, ...]:
    beta1, beta2 = hyper.betas
    corrections = 1 - beta1**hyper.step, (1 - beta2**hyper.step) ** 0.5
    return beta1, 1 - beta1, beta2, 1 - beta2, *corrections, hyper.eps, hyper.lr, 1 - hyper.lr * hyper.weight_decay


@cache
def _tables(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    code = dynamic_map(signed)
    return code.to(device), midpoints(code).to(device)


@triton.jit
def _read(codes, absmax, table, place, inside, block, known):
    code = tl.load(codes + place, mask=inside, other=0).to(tl.int32)
    return tl.load(table + code) * tl.load(absmax + block, mask=known, other=0.0)[:, None]


@triton.jit
def _most(values):
    """Return the largest magnitude of each row, or NaN if the row holds one: a maximum may miss NaN, a sum does not."""
    return tl.where(tl.sum(values * 0.0, axis=1) == 0.0, tl.max(tl.abs(values), axis=1), float("nan"))


@triton.jit
def _kernel(
    param,
    grad,
    m_codes,
    m_absmax,
    v_codes,
    v_absmax,
    m_table,
    m_midpoints,
    v_table,
    v_midpoints,
    broken,
    n,
    beta1,
    rest1,
    beta2,
    rest2,
    correction1,
    root_correction2,
    eps,
    lr,
    kept,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = block[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside, known = place < n, block * WIDTH < n
    g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    m = _read(m_codes, m_absmax, m_table, place, inside, block, known) * beta1 + g * rest1
    v = _read(v_codes, v_absmax, v_table, place, inside, block, known) * beta2 + g * g * rest2
    m = tl.where(inside, m, 0.0)
    v = tl.where(inside, v, 0.0)
    zeros = tl.zeros([ROWS, WIDTH], tl.float32)
    root = tl.div_rn(tl.sqrt_rn(v), zeros + root_correction2)
    direction = tl.div_rn(tl.div_rn(m, zeros + correction1), root + eps)
    p = tl.load(param + place, mask=inside, other=0.0).to(tl.float32) * kept - lr * direction
    tl.store(param + place, p.to(param.dtype.element_ty), mask=inside)
    m_most, v_most = _most(m), _most(v)
    tl.store(m_absmax + block, m_most, mask=known)
    tl.store(v_absmax + block, v_most, mask=known)
    tl.store(m_codes + place, nearest(scaled(m, m_most), m_midpoints).to(tl.uint8), mask=inside)
    code = nearest(scaled(v, v_most), v_midpoints)
    # A second moment above zero never becomes zero: the step would divide by eps alone.
    code = tl.where((v > 0.0) & (code == 0), 1, code)
    tl.store(v_codes + place, code.to(tl.uint8), mask=inside)
    total = m_most * 0.0 + v_most * 0.0
    tl.store(broken + tl.zeros([ROWS], tl.int32), 1, mask=(total != 0.0) | (total != total))
