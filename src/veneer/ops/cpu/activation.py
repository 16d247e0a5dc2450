"""Activations without a gate by csrc/activation, in float32 and bfloat16; the reference computes other dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.ops.activation import KINDS
from veneer.ops.cpu.dtypes import is_served
from veneer.ops.cpu.module import DTYPES, kernels
from veneer.ops.memory import address
from veneer.ops.reference import activation as reference
from veneer.ops.rows import same_dtype, with_rows


def activation_forward(x: Tensor, kind: str) -> Tensor:
    if not is_served(x):
        return reference.activation_forward(x, kind)
    y = torch.empty(x.shape, dtype=x.dtype)
    rows = [with_rows(t) for t in (x, y)]
    kernels().activation_forward(*_sizes(rows[0], kind), *_places(rows))
    return y


def activation_backward(dy: Tensor, x: Tensor, kind: str) -> Tensor:
    if not is_served(x):
        return reference.activation_backward(dy, x, kind)
    dx = torch.empty(x.shape, dtype=x.dtype)
    rows = [with_rows(t) for t in (same_dtype(dy, x), x, dx)]
    kernels().activation_backward(*_sizes(rows[0], kind), *_places(rows))
    return dx


def _sizes(rows: Tensor, kind: str) -> tuple[int, int, int, int]:
    return rows.shape[0], rows.shape[1], DTYPES[rows.dtype], KINDS.index(kind)


def _places(rows: list[Tensor]) -> list[int]:
    return [number for row in rows for number in (address(row), row.stride(0))]
