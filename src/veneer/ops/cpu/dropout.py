"""Dropout by csrc/dropout, in float32, bfloat16 and float16; the reference computes other dtypes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from veneer.ops.cpu.module import DTYPES, kernels
from veneer.ops.memory import address
from veneer.ops.reference import dropout as reference
from veneer.ops.rows import put_back, with_rows

Rows = int | Tensor


def drop(x: Tensor, threshold: int, key: int, rows: Rows) -> Tensor:
    if x.dtype not in DTYPES:
        return reference.drop(x, threshold, key, rows)
    y = torch.empty(x.shape, dtype=x.dtype)
    _run(kernels().dropout_drop, (x, y), (threshold, key, rows))
    return y


def add_dropped(onto: Tensor, g: Tensor, threshold: int, key: int, rows: Rows) -> Tensor:
    if g.dtype not in DTYPES:
        return reference.add_dropped(onto, g, threshold, key, rows)
    written = with_rows(onto)
    _run(kernels().dropout_add_dropped, (g, written), (threshold, key, rows))
    put_back(written, onto)
    return onto


def _run(kernel: Callable[..., None], tensors: tuple[Tensor, Tensor], mask: tuple[int, int, Rows]) -> None:
    source, target = (with_rows(t) for t in tensors)
    threshold, key, rows = mask
    ids, first = (0, rows) if isinstance(rows, int) else (rows.contiguous(), 0)
    place = ids if isinstance(ids, int) else address(ids)
    kernel(
        *source.shape,
        DTYPES[source.dtype],
        (key, threshold, place, first),
        *(number for t in (source, target) for number in (address(t), t.stride(0))),
    )
