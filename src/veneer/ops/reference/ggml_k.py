"""ggml's K types, 256 values a block, in plain torch: groups with scales, and a block scale of these scales."""

from __future__ import annotations

import torch
from jaxtyping import Float32, Int32, UInt8
from torch import Tensor

from veneer.ops.reference.ggml_packing import halves, pack_bits, pack_q3_scales, pack_six_bits, rounded_half
from veneer.ops.reference.ggml_search import (
    SMALLEST,
    Grid,
    affine,
    at_least_zero,
    descent,
    nint,
    ordered_sum,
    positive,
    quotient,
    root,
    signed_largest,
    symmetric,
)

Blocks = Float32[Tensor, "blocks 256"]
Grouped = Float32[Tensor, "blocks groups n"]
PerGroup = Float32[Tensor, "blocks groups"]
PerBlock = Float32[Tensor, " blocks"]
Packed = UInt8[Tensor, "blocks _"]

WEIGHTED = (-0.9, 0.05, 36)  # the grid with importance


def q2_k(x: Blocks, qw: Blocks | None) -> Packed:
    groups = x.view(len(x), 16, 16)
    if qw is None:
        scales, minima, levels = _affine_groups(groups, groups.abs(), Grid(3, -0.5, 0.1, 15, absolute=True))
        d, scale_levels = _by_largest(scales, 15)
        d_min, min_levels = _by_largest(minima, 15)
    else:
        w = _weights(groups, qw, 1)
        scales, minima, levels = _affine_groups(groups, w, Grid(3, *WEIGHTED))
        d, scale_levels = positive(scales, _group_sums(w), 15)
        d_min, min_levels = positive(minima, _group_sums(w), 15)
    packed_scales = (scale_levels | min_levels << 4) & 255
    levels = _affine_anew(groups, levels, (d, packed_scales & 15), (d_min, packed_scales >> 4), 3)
    return torch.cat([packed_scales.to(torch.uint8), pack_bits(levels, 32, 2), halves(d, d_min)], dim=1)


def q4_k(x: Blocks, qw: Blocks | None) -> Packed:
    head, levels = _q4_or_q5(x, qw, Grid(15, -1.0, 0.1, 20))
    return torch.cat([head, pack_bits(levels, 32, 4)], dim=1)


def q5_k(x: Blocks, qw: Blocks | None) -> Packed:
    head, levels = _q4_or_q5(x, qw, Grid(31, -0.5, 0.1, 15))
    return torch.cat([head, pack_bits(levels >> 4, 32, 1), pack_bits(levels, 32, 4)], dim=1)


def q3_k(x: Blocks, qw: Blocks | None) -> Packed:
    groups = x.view(len(x), 16, 16)
    if qw is None:
        scales, levels = _shaped(groups, *descent(groups.reshape(-1, 16), 4))
        d, scale_levels = _by_signed_largest(scales, 32)
    else:
        w = _weights(groups, qw, 2)
        scales, levels = _shaped(groups, *symmetric(groups.reshape(-1, 16), w.view(-1, 16), 4))
        d, scale_levels = symmetric(scales, _group_sums(w), 32)
    steps = rounded_half(d)[:, None] * (scale_levels - 32)
    levels = _symmetric_anew(groups, levels, steps, 4)
    packed = (pack_bits(levels >> 2, 32, 1), pack_bits(levels, 32, 2), pack_q3_scales(scale_levels), halves(d))
    return torch.cat(packed, dim=1)


def q6_k(x: Blocks, qw: Blocks | None) -> Packed:
    groups = x.view(len(x), 16, 16)
    w = groups * groups if qw is None else qw.view_as(groups)
    scales, levels = _shaped(groups, *symmetric(groups.reshape(-1, 16), w.reshape(-1, 16), 32))
    largest = signed_largest(scales)
    inverse = quotient(-128, largest)
    scale_levels = nint(inverse[:, None] * scales).clamp(max=127)
    d = quotient(1, inverse)
    levels = _symmetric_anew(groups, levels, rounded_half(d)[:, None] * scale_levels, 32)
    bytes_of_scales = (scale_levels & 255).to(torch.uint8)
    packed = torch.cat([pack_bits(levels, 64, 4), pack_bits(levels >> 4, 32, 2), bytes_of_scales, halves(d)], dim=1)
    return packed * (largest.abs() >= SMALLEST)[:, None]


def _q4_or_q5(x: Blocks, qw: Blocks | None, grid: Grid) -> tuple[Packed, Int32[Tensor, "blocks 256"]]:
    """Return the first bytes of Q4_K or Q5_K blocks, and the levels.

    The bytes are two float16 scales (for scales and minima), then twelve bytes with the scales and minima of the
    groups.
    """
    groups = x.view(len(x), 8, 32)
    if qw is None:
        mean = ordered_sum((groups * groups).view(-1, 32)).view(len(x), 8, 1) / 32
        scales, minima, levels = _affine_groups(groups, root(mean) + groups.abs(), grid)
        d, scale_levels = _by_largest(scales, 63)
        d_min, min_levels = _by_largest(minima, 63)
    else:
        w = _weights(groups, qw, 2)
        scales, minima, levels = _affine_groups(groups, w, Grid(grid.n_max, *WEIGHTED))
        d, scale_levels = positive(scales, _group_sums(w), 63)
        d_min, min_levels = positive(minima, _group_sums(w), 63)
    scale_levels, min_levels = ((kept & 255).clamp(max=63) for kept in (scale_levels, min_levels))
    levels = _affine_anew(groups, levels, (d, scale_levels), (d_min, min_levels), grid.n_max)
    return torch.cat([halves(d, d_min), pack_six_bits(scale_levels, min_levels)], dim=1), levels


def _weights(groups: Grouped, qw: Blocks, factor: int) -> Grouped:
    """Return ``factor * importance * sqrt(σ² + x²)``, where σ² is the block's mean square."""
    flat = groups.reshape(len(groups), -1)
    variance = factor * ordered_sum(flat * flat) / 256
    return qw.view_as(groups) * root(variance[:, None, None] + groups * groups)


def _group_sums(w: Grouped) -> PerGroup:
    return ordered_sum(w.reshape(-1, w.shape[2])).view(w.shape[:2])


def _affine_groups(groups: Grouped, w: Grouped, grid: Grid) -> tuple[PerGroup, PerGroup, Int32[Tensor, "..."]]:
    n = groups.shape[2]
    scales, minima, levels = affine(groups.reshape(-1, n), w.reshape(-1, n), grid)
    return scales.view(groups.shape[:2]), minima.view(groups.shape[:2]), levels.view_as(groups)


def _shaped(groups: Grouped, scales: Tensor, levels: Tensor) -> tuple[PerGroup, Int32[Tensor, "..."]]:
    return scales.view(groups.shape[:2]), levels.view_as(groups)


def _by_largest(scales: PerGroup, n_max: int) -> tuple[PerBlock, Int32[Tensor, "blocks groups"]]:
    """Return the step by which the largest scale gets level n_max, and the levels of all scales."""
    largest = at_least_zero(scales.amax(dim=1))
    levels = nint(quotient(n_max, largest)[:, None] * scales)
    return largest / torch.full_like(largest, n_max), levels * (largest > 0)[:, None]


def _by_signed_largest(scales: PerGroup, n_max: int) -> tuple[PerBlock, Int32[Tensor, "blocks groups"]]:
    """Return the step by which the scale of largest magnitude gets level 0, and all levels; 0 if all scales are 0."""
    largest = signed_largest(scales)
    inverse = quotient(-n_max, largest)
    signed = (nint(inverse[:, None] * scales) & 255).to(torch.uint8).view(torch.int8).int()
    levels = (signed.clamp(-n_max, n_max - 1) + n_max) * (largest != 0)[:, None]
    return torch.where(largest != 0, quotient(1, inverse), torch.zeros_like(largest)), levels


def _affine_anew(
    groups: Grouped, levels: Tensor, scale: tuple[Tensor, Tensor], minimum: tuple[Tensor, Tensor], n_max: int
) -> Int32[Tensor, "blocks 256"]:
    """Return the levels of the values, quantized again with the scales and minima as the block stores them.

    A group whose stored scale is 0 keeps its ``levels`` from the search.
    """
    step, low = (rounded_half(d)[:, None] * kept for d, kept in (scale, minimum))
    new = nint((groups + low[:, :, None]) / step[:, :, None]).clamp(0, n_max)
    return torch.where((step != 0)[:, :, None], new, levels).view(len(groups), -1)


def _symmetric_anew(groups: Grouped, levels: Tensor, step: PerGroup, n_max: int) -> Int32[Tensor, "blocks 256"]:
    new = nint(groups / step[:, :, None]).clamp(-n_max, n_max - 1) + n_max
    return torch.where((step != 0)[:, :, None], new, levels).view(len(groups), -1)
