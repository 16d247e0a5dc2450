"""Formula of `records.deltas.ResidualDelta`, applied."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from veneer.records.deltas import ResidualDelta


def _gelu_new(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_new": _gelu_new,
    "swish": functional.silu,
    "silu": functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leakyrelu": functional.leaky_relu,
    "identity": torch.clone,
}


def residual_change(delta: ResidualDelta, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """Return ``scale * (up act(down x + down_bias) + up_bias)`` in the bottleneck's own dtype."""
    inner = functional.linear(x.to(delta.down.dtype), delta.down, delta.down_bias)
    return functional.linear(ACTIVATIONS[delta.activation](inner), delta.up, delta.up_bias) * delta.scale


def bottleneck_width(features: int, reduction_factor: float) -> int:
    """Return the width r = ⌊d / reduction factor⌋, at least 1."""
    return max(1, math.floor(features / reduction_factor))
