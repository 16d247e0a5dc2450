"""Choice of tokens by csrc/sample, from float32 and bfloat16; the reference computes other dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.ops.cpu.module import DTYPES, kernels
from veneer.ops.memory import address
from veneer.ops.packed import ROWS
from veneer.ops.reference import sample as reference


def likeliest(logits: Tensor) -> Tensor:
    if logits.dtype not in ROWS:
        return reference.likeliest(logits)
    rows = logits if logits.stride(1) == 1 else logits.contiguous()
    n, d = rows.shape
    values, places = torch.full((n,), -torch.inf), torch.full((n,), -1)
    kernels().sample_likeliest(
        n, d, DTYPES[rows.dtype], address(rows), rows.stride(0), address(values), address(places)
    )
    places[values == torch.inf] = -1
    return places
