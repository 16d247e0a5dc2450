"""Packed weights by csrc/packed."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.ops.cpu.module import DTYPES, kernels
from veneer.ops.memory import address
from veneer.ops.packed import BLOCK, PackedWeight


def pack(weight: Tensor, depth: int) -> Tensor:
    o, i = weight.shape
    rows = _rows(weight)
    panels = torch.empty((o + -o % BLOCK) * depth, dtype=weight.dtype)
    kernels().packed_pack(DTYPES[weight.dtype], o, i, depth, address(rows), rows.stride(0), address(panels))
    return panels


def unpack(panels: Tensor, shape: tuple[int, int], depth: int) -> Tensor:
    rows = torch.empty(shape, dtype=panels.dtype)
    kernels().packed_unpack(DTYPES[panels.dtype], *shape, depth, address(panels), address(rows))
    return rows


def matmul(weight: PackedWeight, x: Tensor, onto: Tensor | None, out: Tensor) -> None:
    panels = weight.panels
    multiply((DTYPES[panels.dtype], *weight.shape, weight.depth, address(panels), 0, 0), x, onto, out)


def multiply(weight: tuple[int, ...], x: Tensor, onto: Tensor | None, out: Tensor) -> None:
    """Write ``W x`` into ``out``, or ``onto + W x`` if ``onto`` is given.

    ``weight`` describes the packed W: dtype, o, i, depth, address of the panels, coding and unit.
    """
    x = _rows(x)
    kernels().packed_matmul(
        *weight,
        x.shape[0],
        address(x),
        x.stride(0),
        DTYPES[x.dtype],
        address(out),
        out.stride(0),
        DTYPES[out.dtype],
        0 if onto is None else address(onto),
        0 if onto is None else onto.stride(0),
    )


def _rows(x: Tensor) -> Tensor:
    """Return x with its last axis contiguous."""
    return x if x.stride(1) == 1 else x.contiguous()
