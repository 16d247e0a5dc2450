"""ggml's types of 32 values a block, Q4_0 to Q8_0, in plain torch."""

from __future__ import annotations

import torch
from jaxtyping import Float32, Int32, UInt8
from torch import Tensor

from veneer.ops.reference.ggml_packing import halves, pack_bits
from veneer.ops.reference.ggml_search import Grid, affine, quotient, signed_largest, smallest, symmetric

Blocks = Float32[Tensor, "blocks 32"]
Packed = UInt8[Tensor, "blocks _"]


def q8_0(x: Blocks) -> Packed:
    scale = x.abs().amax(dim=1) / torch.full_like(x[:, 0], 127)
    scaled = x * _reciprocal(scale)[:, None]
    scaled = torch.where(scaled.isfinite(), scaled, torch.zeros_like(scaled))  # as x86-64's conversion has it
    whole = scaled.trunc()
    levels = whole + ((scaled - whole).abs() >= 0.5) * scaled.sign()  # half away from zero
    return torch.cat([halves(scale), levels.to(torch.int8).view(torch.uint8)], dim=1)


def symmetric_blocks(x: Blocks, w: Blocks | None, bits: int) -> Packed:
    """Return blocks of Q4_0 and Q5_0: without weights, the first value of largest magnitude takes the lowest level."""
    n_max = 1 << (bits - 1)
    if w is None:
        scale = signed_largest(x) / torch.full_like(x[:, 0], -n_max)
        levels = _rounded_up(x, _reciprocal(scale), n_max + 0.5, 2 * n_max - 1)
    else:
        scale, levels = symmetric(x, w, n_max)
    return _packed(halves(scale), levels, bits)


def affine_blocks(x: Blocks, w: Blocks | None, bits: int) -> Packed:
    """Return blocks of Q4_1 and Q5_1: without weights, levels are evenly spaced from smallest to largest value."""
    n_max = (1 << bits) - 1
    if w is None:
        low = smallest(x)
        scale = (-smallest(-x) - low) / torch.full_like(low, n_max)
        levels = _rounded_up(x - low[:, None], _reciprocal(scale), 0.5, n_max)
    else:
        scale, minimum, levels = affine(x, w, Grid(n_max, -0.9, 0.05, 36))
        low = -minimum
    return _packed(halves(scale, low), levels, bits)


def _packed(scales: Packed, levels: Int32[Tensor, "blocks 32"], bits: int) -> Packed:
    fifth = [pack_bits(levels >> 4, 1, 1)] if bits == 5 else []
    return torch.cat([scales, *fifth, pack_bits(levels, 16, 4)], dim=1)


def _reciprocal(scale: Float32[Tensor, " blocks"]) -> Float32[Tensor, " blocks"]:
    """Return ``1 / scale``: 0 for a scale of 0, infinite for one under 3e-39."""
    return torch.where(scale != 0, quotient(1, scale), torch.zeros_like(scale))


def _rounded_up(x: Blocks, inverse: Float32[Tensor, " blocks"], half: float, most: int) -> Int32[Tensor, "blocks 32"]:
    """Return ``x * inverse + half`` truncated to whole numbers; 0 if the product is infinite."""
    scaled = x * inverse[:, None] + half
    return torch.where(scaled.isfinite(), scaled, torch.zeros_like(scaled)).int().clamp(max=most)
