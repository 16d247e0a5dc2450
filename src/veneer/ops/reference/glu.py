"""Gated linear units in plain torch: the specification."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def glu_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (_value_and_slope(gate.to(wide), activation)[0] * up.to(wide)).to(gate.dtype)


def glu_backward(
    dh: Tensor, gate: Tensor, up: Tensor, activation: str, owns: tuple[bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(gate.dtype, torch.float32)
    value, slope = _value_and_slope(gate.to(wide), activation)
    dh_wide, up_wide = dh.to(wide), up.to(wide)
    results = (dh_wide * up_wide * slope).to(gate.dtype), (dh_wide * value).to(up.dtype), (value * up_wide).to(dh.dtype)
    owned = (owns[0], owns[0], owns[1])
    dgate, dup, h = (
        own.copy_(result) if owns_it else result
        for own, result, owns_it in zip((gate, up, dh), results, owned, strict=True)
    )
    return dgate, dup, h


ALPHA, LIMIT = 1.702, 7.0


def clamped_forward(inner: Tensor) -> Tensor:
    gate, up = _clamped(inner)
    return ((up + 1) * gate * torch.sigmoid(ALPHA * gate)).to(inner.dtype)


def clamped_backward(dh: Tensor, inner: Tensor) -> None:
    gate, up = _clamped(inner)
    dh_wide, share = dh.to(gate.dtype), torch.sigmoid(ALPHA * gate)
    dgate = dh_wide * (up + 1) * share * (1 + ALPHA * gate * (1 - share))
    dgate = dgate.masked_fill(inner[..., ::2] > LIMIT, 0)
    dup = (dh_wide * gate * share).masked_fill(inner[..., 1::2].abs() > LIMIT, 0)
    dh.copy_((up + 1) * gate * share)
    inner.copy_(torch.stack([dgate, dup], dim=-1).flatten(-2))


def _clamped(inner: Tensor) -> tuple[Tensor, Tensor]:
    """Return gate and up, which alternate in the last axis, in float32 or wider and within their bounds."""
    wide = inner.to(torch.promote_types(inner.dtype, torch.float32))
    return wide[..., ::2].clamp(max=LIMIT), wide[..., 1::2].clamp(-LIMIT, LIMIT)


def _value_and_slope(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return the activation and its derivative."""
    if activation == "silu":
        sigmoid = torch.sigmoid(x)
        return x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))
    if activation == "gelu":
        cdf = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        return x * cdf, cdf + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    inner_scale = math.sqrt(2 / math.pi)
    tanh = torch.tanh(inner_scale * (x + 0.044715 * x**3))
    slope = 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * inner_scale * (1 + 3 * 0.044715 * x * x)
    return 0.5 * x * (1 + tanh), slope
