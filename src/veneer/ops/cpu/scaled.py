"""Matrices of small numbers with scales by csrc/coded."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from veneer.ops.cpu.module import DTYPES, kernels
from veneer.ops.memory import address
from veneer.ops.reference import scaled as reference
from veneer.ops.scaled import CODINGS, ScaledCodes

STORED = {**DTYPES, torch.float8_e8m0fnu: 3, torch.float8_e4m3fn: 4, torch.uint8: 5}
"""As csrc/coded/coded.h counts how scales and zeros are stored; -1 stands for no zeros."""


def decode(w: ScaledCodes, index: slice | Int[Tensor, " k"]) -> Float32[Tensor, "k columns"]:
    if isinstance(index, slice):
        n_rows, first, order = index.stop - index.start, index.start, 0
    else:
        n_rows, first, order = len(index), 0, address(index)
    out = torch.empty(n_rows, w.columns)
    kernels().scaled_decode(address(out), n_rows, w.columns, first, order, *_matrix(w))
    return out


def matmul(x: Float[Tensor, "n i"], w: ScaledCodes) -> Float[Tensor, "n o"]:
    if x.dtype == torch.float64:
        return reference.matmul(x, w)
    wide, out = x.float().contiguous(), torch.empty(len(x), len(w.codes))
    kernels().scaled_multiply(address(out), len(w.codes), w.columns, address(wide), len(x), *_matrix(w))
    return out.to(x.dtype)


def _matrix(w: ScaledCodes) -> tuple[int | float | bool, ...]:
    """Return a matrix in the kernel's form: addresses, sizes, and how numbers are stored."""
    zero = float(1 << w.bits - 1) if w.coding == "whole" else 0.0
    power = w.scales.dtype == torch.uint8
    return (
        address(w.codes),
        w.codes.stride(0),
        w.bits,
        CODINGS.index(w.coding),
        address(w.scales),
        STORED[torch.float8_e8m0fnu if power else w.scales.dtype],
        0 if w.zeros is None else address(w.zeros),
        -1 if w.zeros is None else STORED[w.zeros.dtype],
        zero,
        0 if w.overall is None else address(w.overall),
        w.divides,
        w.height,
        w.group,
        DTYPES[w.rounding],
    )
