"""Activations by torch's own kernels, which compute narrow dtypes in float32 and round once: the specification."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_aten = torch.ops.aten


def activation_forward(x: Tensor, kind: str) -> Tensor:
    if kind == "silu":
        return functional.silu(x)
    if kind == "relu":
        return functional.relu(x)
    if kind == "relu_squared":
        return functional.relu(x).square_()
    return functional.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def activation_backward(dy: Tensor, x: Tensor, kind: str) -> Tensor:
    dx: Tensor
    if kind == "silu":
        dx = _aten.silu_backward(dy, x)
    elif kind == "relu":
        dx = _aten.threshold_backward(dy, x, 0)
    elif kind == "relu_squared":
        dx = functional.relu(x).mul_(2).mul_(dy)
    else:
        dx = _aten.gelu_backward(dy, x, approximate="tanh" if kind == "gelu_tanh" else "none")
    return dx
