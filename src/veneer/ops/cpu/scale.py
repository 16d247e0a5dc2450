"""Scale and shift of columns by csrc/scale, in float32, bfloat16 and float16; the reference computes wider dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.ops.cpu.module import DTYPES, kernels
from veneer.ops.memory import address
from veneer.ops.reference import scale as reference
from veneer.ops.rows import put_back, with_rows


def forward(z: Tensor, scale: Tensor | None, bias: Tensor | None, y: Tensor) -> None:
    if not _is_served(z, scale, bias):
        return reference.forward(z, scale, bias, y)
    vectors = [_float(scale), _float(bias)]
    rows, written = with_rows(z), with_rows(y)  # held until the kernel is done: either may be a copy
    places = (0 if vector is None else address(vector) for vector in vectors)
    kernels().scale_forward(*z.shape, DTYPES[z.dtype], *_place(rows), *places, *_place(written))
    put_back(written, y)
    return None


def backward(
    dy: Tensor, z: Tensor | None, scale: Tensor | None, dz: Tensor | None, with_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    if not _is_served(dy, scale):
        return reference.backward(dy, z, scale, dz, with_bias)
    factor = _float(scale)
    rows, seen, written = (None if given is None else with_rows(given) for given in (dy, z, dz))
    dscale = None if z is None else torch.empty(dy.shape[1], dtype=torch.float32)
    dbias = torch.empty(dy.shape[1], dtype=torch.float32) if with_bias else None
    kernels().scale_backward(
        *dy.shape,
        DTYPES[dy.dtype],
        *_place(rows),
        *_place(seen),
        0 if factor is None else address(factor),
        *_place(written),
        *(0 if total is None else address(total) for total in (dscale, dbias)),
    )
    if written is not None and dz is not None:
        put_back(written, dz)
    return dscale, dbias


def _is_served(x: Tensor, *vectors: Tensor | None) -> bool:
    return x.dtype in DTYPES and all(vector is None or vector.dtype in DTYPES for vector in vectors)


def _float(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.detach().to(torch.float32).contiguous()


def _place(rows: Tensor | None) -> tuple[int, int]:
    return (0, 0) if rows is None else (address(rows), rows.stride(0))
