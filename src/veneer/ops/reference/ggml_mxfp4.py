"""ggml's MXFP4 in plain torch: 32 values share an exponent, and each has an index into the values of E2M1."""

from __future__ import annotations

import torch
from jaxtyping import Float32, Int32, UInt8
from torch import Tensor

from veneer.ops.reference.ggml_packing import pack_bits

DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice the values of E2M1, which are multiplied by half of the power of two."""


def half_powers(exponents: Int32[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """Return half of ``2 ** (e - 127)`` for exponents 0 to 255."""
    normal = exponents.clamp(min=1) - 1 << 23
    return torch.where(exponents < 2, 0x00200000 << exponents.clamp(max=1), normal).to(torch.int32).view(torch.float32)


def mxfp4(x: Float32[Tensor, "blocks 32"]) -> UInt8[Tensor, "blocks 17"]:
    """Return the bytes of blocks. If two values of E2M1 are equally near, the first is taken.

    For blocks far below 2 ** -125 the exponent wraps, as in ggml, and all values become zero.
    """
    largest = x.abs().amax(dim=1)
    # rounded to float32 once, as ggml's logarithm is: just below a power of two it is that power's
    rounded = torch.log2(largest.double()).float().floor()
    exponent = torch.where(largest > 0, rounded, torch.full_like(largest, -125)).to(torch.int32) + 125 & 255
    step, best, error = half_powers(exponent)[:, None], torch.zeros_like(x, dtype=torch.int32), x.abs()
    for level, value in enumerate(DOUBLED):
        other = (value * step - x).abs()
        better = other < error
        best, error = torch.where(better, level, best), torch.where(better, other, error)
    return torch.cat([exponent[:, None].to(torch.uint8), pack_bits(best, 16, 4)], dim=1)
