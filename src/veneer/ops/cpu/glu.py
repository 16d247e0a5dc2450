"""Gated linear units by csrc/glu, in float32 and bfloat16; the reference computes other dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.ops.cpu.dtypes import is_served
from veneer.ops.cpu.module import DTYPES, kernels
from veneer.ops.glu import ACTIVATIONS
from veneer.ops.memory import address
from veneer.ops.reference import glu as reference
from veneer.ops.rows import put_back, same_dtype, with_rows


def glu_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    if not is_served(gate):
        return reference.glu_forward(gate, up, activation)
    h = torch.empty(gate.shape, dtype=gate.dtype)
    rows = [with_rows(t) for t in (gate, up, h)]
    kernels().glu_forward(*_sizes(rows[0], activation), *_places(rows))
    return h


def glu_backward(
    dh: Tensor, gate: Tensor, up: Tensor, activation: str, owns: tuple[bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    if not is_served(gate):
        return reference.glu_backward(dh, gate, up, activation, owns)
    dh = same_dtype(dh, gate)
    owned = (owns[0], owns[0], owns[1])
    results = [
        own if owns_it else torch.empty(gate.shape, dtype=gate.dtype)
        for own, owns_it in zip((gate, up, dh), owned, strict=True)
    ]
    rows = [with_rows(t) for t in (dh, gate, up)]
    written = [with_rows(t) for t in results]
    kernels().glu_backward(*_sizes(rows[1], activation), *_places(rows), *_places(written))
    for result, row in zip(results, written, strict=True):
        put_back(row, result)
    return results[0], results[1], results[2]


def clamped_forward(inner: Tensor) -> Tensor:
    if not is_served(inner):
        return reference.clamped_forward(inner)
    h = torch.empty(len(inner), inner.shape[1] // 2, dtype=inner.dtype)
    kernels().glu_clamped_forward(*h.shape, DTYPES[h.dtype], *_places([with_rows(inner), h]))
    return h


def clamped_backward(dh: Tensor, inner: Tensor) -> None:
    if not is_served(inner):
        reference.clamped_backward(dh, inner)
        return
    rows = [with_rows(dh), with_rows(inner)]
    kernels().glu_clamped_backward(*dh.shape, DTYPES[dh.dtype], *_places([*rows, rows[1], rows[0]]))
    for row, given in zip(rows, (dh, inner), strict=True):
        put_back(row, given)


def _sizes(rows: Tensor, activation: str) -> tuple[int, int, int, int]:
    return rows.shape[0], rows.shape[1], DTYPES[rows.dtype], ACTIVATIONS.index(activation)


def _places(rows: list[Tensor]) -> list[int]:
    return [number for row in rows for number in (address(row), row.stride(0))]
