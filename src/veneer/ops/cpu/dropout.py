"""Dropout by csrc/dropout, in float32, bfloat16 and float16; the reference computes other dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.ops.cpu.module import DTYPES, kernels
from veneer.ops.memory import address
from veneer.ops.reference import dropout as reference
from veneer.ops.rows import with_rows

Rows = int | Tensor


def drop(x: Tensor, threshold: int, key: int, rows: Rows) -> Tensor:
    if x.dtype not in DTYPES:
        return reference.drop(x, threshold, key, rows)
    y = torch.empty(x.shape, dtype=x.dtype)
    source, target = with_rows(x), with_rows(y)
    ids, first = (0, rows) if isinstance(rows, int) else (rows.contiguous(), 0)
    place = ids if isinstance(ids, int) else address(ids)
    kernels().dropout_drop(
        *source.shape,
        DTYPES[source.dtype],
        (key, threshold, place, first),
        *(number for t in (source, target) for number in (address(t), t.stride(0))),
    )
    return y
