"""ggml's non-linear types of four bits, IQ4_NL and IQ4_XS, in plain torch: levels are indices into sixteen values."""

from __future__ import annotations

import torch
from jaxtyping import Float32, Int32, UInt8
from torch import Tensor

from veneer.ops.reference.ggml_packing import halves, pack_bits
from veneer.ops.reference.ggml_search import SMALLEST, nint, ordered_sum, quotient, ratio, root, signed_largest

VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

Groups = Float32[Tensor, "groups 32"]


def iq4_nl(x: Groups, qw: Groups | None) -> UInt8[Tensor, "blocks 18"]:
    scale = _scales(x, _weights(x, qw, x))
    inverse = torch.where(scale != 0, quotient(1, scale), torch.zeros_like(scale))
    return torch.cat([halves(scale), pack_bits(_nearest(inverse[:, None] * x), 16, 4)], dim=1)


def iq4_xs(x: Float32[Tensor, "blocks 256"], qw: Float32[Tensor, "blocks 256"] | None) -> UInt8[Tensor, "blocks 136"]:
    groups = x.view(-1, 32)
    weights = _weights(groups, None if qw is None else qw.view(-1, 32), x)
    scales = _scales(groups, weights).view(-1, 8)
    d = signed_largest(scales) / torch.full_like(x[:, 0], -32)
    inverse = torch.where(d != 0, quotient(1, d), torch.zeros_like(d))
    scale_levels = nint(inverse[:, None] * scales).clamp(-32, 31)
    step = (d[:, None] * scale_levels).view(-1)
    by = torch.where(step != 0, quotient(1, step), torch.zeros_like(step))
    levels = _nearest(by[:, None] * groups).view(len(x), 256)
    kept = scale_levels + 32
    packed = (halves(d), pack_bits(kept >> 4, 1, 2), pack_bits(kept, 1, 4), pack_bits(levels, 16, 4))
    return torch.cat(packed, dim=1)


def _weights(groups: Groups, qw: Groups | None, blocks: Tensor) -> Groups:
    """Return the weights of the search: x², or ``importance * sqrt(σ² + x²)`` if ``qw`` is given.

    σ² is twice the block's mean square.
    """
    if qw is None:
        return groups * groups
    variance = ordered_sum(blocks * blocks) * (2.0 / blocks.shape[1])
    return qw * root(variance.repeat_interleave(blocks.shape[1] // 32)[:, None] + groups * groups)


def _scales(x: Groups, w: Groups) -> Float32[Tensor, " groups"]:
    """Fit the scale of each group in ``x ≈ scale * VALUES[level]`` by trying several around the extreme value."""
    largest = signed_largest(x)
    table = torch.tensor(VALUES, dtype=torch.float32, device=x.device)

    def tried(inverse: Tensor) -> tuple[Tensor, Tensor]:
        q = table[_nearest(inverse[:, None] * x)]
        return ordered_sum((w * q) * x), ordered_sum((w * q) * q)

    sum_qx, sum_q2 = tried(quotient(1, -largest / torch.full_like(largest, VALUES[0])))
    scale = ratio(sum_qx, sum_q2)
    best = scale * sum_qx
    for k in range(-7, 8):
        sum_qx, sum_q2 = tried(quotient(k + VALUES[0], largest))
        better = (sum_q2 > 0) & (sum_qx * sum_qx > best * sum_q2)
        scale = torch.where(better, sum_qx / sum_q2, scale)
        best = torch.where(better, scale * sum_qx, best)
    return torch.where(largest.abs() < SMALLEST, torch.zeros_like(scale), scale)


def _nearest(v: Groups) -> Int32[Tensor, "groups 32"]:
    """Return the index of the nearest of `VALUES`; on a tie, the upper one."""
    table = torch.tensor(VALUES, dtype=torch.float32, device=v.device)
    return torch.bucketize(v, (table[:-1] + table[1:]) / 2, right=True, out_int32=True)
