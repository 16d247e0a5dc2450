"""Functions on tiles that several kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

SQRT_HALF = tl.constexpr(0.7071067811865476)
NORMAL_DENSITY = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
TWICE_TANH_SCALE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)


@triton.jit
def sigmoid(x):
    """Return the sigmoid s of x, and its slope s (1 - s) without a cancellation."""
    e = tl.exp(-tl.abs(x))
    inverse = 1.0 / (1.0 + e)
    return tl.where(x < 0.0, e, 1.0) * inverse, e * inverse * inverse


@triton.jit
def tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))
    magnitude = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0.0, -magnitude, magnitude)


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """Return the activation and its derivative."""
    if ACTIVATION == "silu":
        s, ds = sigmoid(x)
        value = x * s
        slope = s + x * ds
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(x * SQRT_HALF))
        value = x * cdf
        slope = cdf + x * tl.exp(-0.5 * x * x) * NORMAL_DENSITY
    else:  # 0.5 (1 + tanh z) is the sigmoid of 2z
        s, ds = sigmoid((x + 0.044715 * x * x * x) * TWICE_TANH_SCALE)
        value = x * s
        slope = s + x * ds * TWICE_TANH_SCALE * (1.0 + 0.134145 * x * x)
    return value, slope
