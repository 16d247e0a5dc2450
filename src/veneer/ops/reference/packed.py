"""Packed weights in plain torch: the specification of the layout, and of the product."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from veneer.ops.packed import BLOCK, BLOCKS, PackedWeight


def pack(weight: Float[Tensor, "o i"], depth: int) -> Tensor:
    pair = _pair(weight.dtype)
    filled = functional.pad(weight, (0, depth - weight.shape[1], 0, -len(weight) % BLOCK))
    panels = torch.split(filled, BLOCKS * BLOCK)
    return torch.cat([p.reshape(len(p), depth // pair, pair).transpose(0, 1).flatten() for p in panels])


def unpack(panels: Tensor, shape: tuple[int, int], depth: int) -> Float[Tensor, "o i"]:
    o, i = shape
    pair, filled = _pair(panels.dtype), o + -o % BLOCK
    widths = [min(BLOCKS * BLOCK, filled - first) for first in range(0, filled, BLOCKS * BLOCK)]
    parts = torch.split(panels, [width * depth for width in widths])
    rows = [
        p.view(depth // pair, width, pair).transpose(0, 1).reshape(width, depth)
        for p, width in zip(parts, widths, strict=True)
    ]
    return torch.cat([*rows, panels.new_empty(0, depth)])[:o, :i].contiguous()


def matmul(weight: PackedWeight, x: Float[Tensor, "n i"], onto: Tensor | None, out: Tensor) -> None:
    sums = x.float() @ unpack(weight.panels, weight.shape, weight.depth).float().T
    out.copy_(sums if onto is None else onto.float() + sums)


def _pair(dtype: torch.dtype) -> int:
    """Return the number of inputs whose values are stored side by side."""
    return 2 if dtype == torch.bfloat16 else 1
