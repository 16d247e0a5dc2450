"""RMSNorm and LayerNorm over the last axis, statistics in float32, with hand-written backward.

The ``*_forward`` and ``*_backward`` pairs are the kernels themselves, for blocks with a hand-written backward.
`rms_norm` and `layer_norm` wrap them for autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.errors import ShapeError
from veneer.ops.dispatch import implementation


def rms_norm(
    x: Float[Tensor, "*batch d"],
    weight: Float[Tensor, " d"],
    eps: float,
    offset: float = 0.0,
    *,
    backend: str | None = None,
) -> Float[Tensor, "*batch d"]:
    """Return ``x / sqrt(mean(x²) + eps) * (weight + offset)`` (Zhang, Sennrich 2019, arXiv 1910.07467).

    Gemma's offset is 1. Computed in float32 and rounded once to x's dtype. Keeps x and one float per row for the
    backward. Raises ShapeError if weight does not fit x.
    """
    out: Tensor = _RmsNorm.apply(x, weight, eps, offset, backend)  # type: ignore[no-untyped-call]
    return out


def layer_norm(
    x: Float[Tensor, "*batch d"],
    weight: Float[Tensor, " d"],
    bias: Float[Tensor, " d"],
    eps: float,
    *,
    backend: str | None = None,
) -> Float[Tensor, "*batch d"]:
    """Return ``(x - mean) / sqrt(var + eps) * weight + bias`` (Ba et al. 2016, arXiv 1607.06450).

    Computed in float32 and rounded once. Raises ShapeError if weight or bias does not fit x.
    """
    out: Tensor = _LayerNorm.apply(x, weight, bias, eps, backend)  # type: ignore[no-untyped-call]
    return out


def rms_norm_forward(
    x: Float[Tensor, "*batch d"],
    weight: Float[Tensor, " d"],
    eps: float,
    offset: float = 0.0,
    *,
    backend: str | None = None,
) -> tuple[Float[Tensor, "*batch d"], Float[Tensor, "*batch"]]:
    """Return the output of `rms_norm`, and the reciprocal root mean square of each row (float32) for its backward."""
    _check(x, weight=weight)
    y, rstd = implementation("norm.rms_norm_forward", x.device, backend)(x, weight, eps, offset)
    return y, rstd


def rms_norm_backward(
    dy: Float[Tensor, "*batch d"],
    x: Float[Tensor, "*batch d"],
    weight: Float[Tensor, " d"],
    rstd: Float[Tensor, "*batch"],
    offset: float = 0.0,
    *,
    weight_grad: bool = False,
    backend: str | None = None,
) -> tuple[Float[Tensor, "*batch d"], Float[Tensor, " d"] | None]:
    """Return the gradients of `rms_norm` in x and, if ``weight_grad``, in weight."""
    _check(x, weight=weight)
    kernel = implementation("norm.rms_norm_backward", x.device, backend)
    dx, dweight = kernel(dy, x, weight, rstd, offset, weight_grad)
    return dx, dweight


def layer_norm_forward(
    x: Float[Tensor, "*batch d"],
    weight: Float[Tensor, " d"],
    bias: Float[Tensor, " d"],
    eps: float,
    *,
    backend: str | None = None,
) -> tuple[Float[Tensor, "*batch d"], Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Return the output of `layer_norm`, and the mean and reciprocal standard deviation of each row, in float32."""
    _check(x, weight=weight, bias=bias)
    y, mean, rstd = implementation("norm.layer_norm_forward", x.device, backend)(x, weight, bias, eps)
    return y, mean, rstd


def layer_norm_backward(
    dy: Float[Tensor, "*batch d"],
    x: Float[Tensor, "*batch d"],
    weight: Float[Tensor, " d"],
    mean: Float[Tensor, "*batch"],
    rstd: Float[Tensor, "*batch"],
    *,
    weight_grad: bool = False,
    backend: str | None = None,
) -> tuple[Float[Tensor, "*batch d"], Float[Tensor, " d"] | None, Float[Tensor, " d"] | None]:
    """Return the gradients of `layer_norm` in x and, if ``weight_grad``, in weight and bias."""
    _check(x, weight=weight)
    kernel = implementation("norm.layer_norm_backward", x.device, backend)
    dx, dweight, dbias = kernel(dy, x, weight, mean, rstd, weight_grad)
    return dx, dweight, dbias


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float, backend: str | None) -> Tensor:
        y, rstd = rms_norm_forward(x, weight, eps, offset, backend=backend)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset, ctx.backend = offset, backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1]
        dx, dw = rms_norm_backward(dy, x, weight, rstd, ctx.offset, weight_grad=wanted, backend=ctx.backend)
        return dx, dw, None, None, None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, backend: str | None) -> Tensor:
        y, mean, rstd = layer_norm_forward(x, weight, bias, eps, backend=backend)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.backend = backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        dx, dw, db = layer_norm_backward(dy, x, weight, mean, rstd, weight_grad=wanted, backend=ctx.backend)
        return dx, dw, db, None, None


def _check(x: Tensor, **vectors: Tensor) -> None:
    wrong = {name: tuple(v.shape) for name, v in vectors.items() if tuple(v.shape) != tuple(x.shape[-1:])}
    if wrong:
        raise ShapeError(
            f"x has shape {tuple(x.shape)}, so {', '.join(wrong)} must have shape {tuple(x.shape[-1:])}: {wrong}"
        )
