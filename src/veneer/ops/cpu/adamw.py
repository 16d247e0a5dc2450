"""8-bit AdamW by csrc/adamw; the reference computes dtypes that the kernel does not support."""

from __future__ import annotations

import math
from functools import cache

import torch
from jaxtyping import Float32, Int32
from torch import Tensor

from veneer.ops.adamw import AdamWStep, Moment8bit, not_finite
from veneer.ops.blockwise import dynamic_map
from veneer.ops.cpu.module import DTYPES, kernels
from veneer.ops.memory import address
from veneer.ops.reference import adamw as reference

_FIRST_BIN, _LAST_BIN = 0x3400, 0x3F80  # the upper 16 bits of 2**-23 and of 1
_NEVER = 0xFFFF
_FLOOR = 512  # floats from here to 1024 are 2^-14 apart


@torch.no_grad()
def adamw_8bit_(param: Tensor, grad: Tensor, moments: tuple[Moment8bit, Moment8bit], hyper: AdamWStep) -> None:
    parts = [t for moment in moments for t in (moment.codes, moment.absmax)]
    if param.dtype not in DTYPES or grad.dtype not in DTYPES or not all(t.is_contiguous() for t in (param, *parts)):
        return reference.adamw_8bit_(param, grad, moments, hyper)
    grad = grad.contiguous()
    finite = kernels().adamw_8bit(
        address(param),
        DTYPES[param.dtype],
        address(grad),
        DTYPES[grad.dtype],
        param.numel(),
        *_places(moments[0], signed=True),
        *_places(moments[1], signed=False),
        hyper.lr,
        *hyper.betas,
        hyper.eps,
        hyper.weight_decay,
        hyper.step,
    )
    if not finite:
        raise not_finite(param)
    return None


def _places(moment: Moment8bit, signed: bool) -> tuple[int, ...]:
    tables = dynamic_map(signed), code_bins(signed), code_lines(signed)
    return tuple(address(t) for t in (moment.codes, moment.absmax, *tables))


@cache
def code_bins(signed: bool) -> Int32[Tensor, " bins"]:
    """Return the table with which the kernel finds the nearest code without a search, indexed by a value's upper 16
    bits.

    All values with the same upper 16 bits are a bin, which holds at most one midpoint between codes. A bin's entry is
    ``threshold << 8 | code``, where ``code`` is that of its smallest magnitude. If a value's lower 16 bits exceed
    ``threshold``, the next code is nearer.
    """
    code = dynamic_map(signed)
    midpoints = (code[:-1] + code[1:]) / 2
    return torch.cat([_bins_of(midpoints, sign) for sign in ((1, -1) if signed else (1,))])


def _bins_of(midpoints: Tensor, sign: int) -> Tensor:
    upper = torch.arange(_FIRST_BIN, _LAST_BIN + 1, dtype=torch.int32)
    codes = torch.bucketize((upper << 16).view(torch.float32) * sign, midpoints).int()
    magnitudes = (midpoints * sign).clamp_min(0)
    at = codes if sign > 0 else codes - 1
    inside = at.clamp(0, len(midpoints) - 1)
    bits = magnitudes[inside].view(torch.int32)
    here = (at == inside) & ((bits >> 16) == upper)
    # Up, a midpoint itself belongs below; down, to the code beyond it: the lower one on a tie.
    threshold = torch.where(here, (bits & 0xFFFF) - int(sign < 0), _NEVER)
    return (threshold << 8) | codes


@cache
def code_lines(signed: bool) -> Float32[Tensor, "112"]:
    """Return the coefficients that give a kernel the nearest code without a table: CodeLines of csrc/adamw/adamw.h.

    Codes are equally spaced within a decade, so the code is a linear function of the magnitude.
    """
    code = dynamic_map(signed).double()
    zero = int((code == 0).nonzero())
    middles = (dynamic_map(signed)[:-1] + dynamic_map(signed)[1:]) / 2
    lines = _decades(code, zero, 2 if signed else 1)
    start = -zero - 0.5 if signed else _FLOOR
    firsts = [first for first, _, _ in lines]
    borders = [float(middles[first - 1]) for first in firsts[1:]]
    bins = [int(torch.tensor(b).view(torch.int32)) >> 24 & 15 for b in borders]
    edge, columns = [math.inf] * 16, [[0.0] * 32 for _ in range(3)]
    for number in range(16):
        before = sum(b < number for b in bins)
        after = sum(b <= number for b in bins)
        if after > before:
            edge[number] = borders[before]
        for place, line in ((number, before), (16 + number, after)):
            first, last, slope = lines[line]
            columns[0][place] = slope
            columns[1][place] = start + _offset(middles, first, last, slope) + (0.0 if signed else 2**-14)
            columns[2][place] = start + last + 0.5
    return torch.tensor([*edge, *columns[0], *columns[1], *columns[2]], dtype=torch.float32)


def _decades(code: Tensor, zero: int, narrow: int) -> list[tuple[int, int, float]]:
    """Return (first code, last code, slope) of each range in which the codes are equally spaced: zero, each decade of
    magnitudes, and one.

    The slope is the number of codes per unit of magnitude, 0 for a range of a single code.
    """
    lines, first = [(zero, zero, 0.0)], zero + 1
    while first < len(code) - 1:
        last = first + 2 ** len(lines) // narrow - 1
        width = float(code[last] - code[first])
        lines.append((first, last, (last - first) / width if last > first else 0.0))
        first = last + 1
    return [*lines, (first, first, 0.0)]


def _offset(middles: Tensor, first: int, last: int, slope: float) -> float:
    """Return the offset of the line ``slope * magnitude + offset`` that maps the midpoints between a decade's codes to
    whole numbers.
    """
    if first == last:
        return first + 0.5
    whole = torch.arange(first + 1, last + 1, dtype=torch.float64)
    rounded = float(torch.tensor(slope, dtype=torch.float32))
    return float((whole - middles[first:last].double() * rounded).mean())
