"""RMSNorm and LayerNorm over the last axis, statistics in float32, with hand-written backward.

Blocks with a hand-written backward call the ``*_forward`` and ``*_backward`` pairs, so autograd does not see them.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from veneer.errors import ShapeError
from veneer.ops.dispatch import implementation


def rms_norm_forward(
    x: Float[Tensor, "*batch d"],
    weight: Float[Tensor, " d"],
    eps: float,
    offset: float = 0.0,
    *,
    backend: str | None = None,
) -> tuple[Float[Tensor, "*batch d"], Float[Tensor, "*batch"]]:
    """Return ``x / sqrt(mean(x²) + eps) * (weight + offset)``, and each row's reciprocal root mean square (float32).

    The output is computed in float32 and rounded once to x's dtype; Gemma's offset is 1. Raises ShapeError if weight
    does not fit x. Source: Zhang and Sennrich 2019, arXiv 1910.07467.
    """
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
    added: Float[Tensor, "*batch d"] | None = None,
    backend: str | None = None,
) -> tuple[Float[Tensor, "*batch d"], Float[Tensor, " d"] | None]:
    """Return the gradients of `rms_norm_forward` with respect to x and, if ``weight_grad``, to weight.

    If ``added`` is given, it is added to the gradient with respect to x, on a GPU before that gradient is rounded.
    """
    _check(x, added, weight=weight)
    kernel = implementation("norm.rms_norm_backward", x.device, backend)
    dx, dweight = kernel(dy, x, weight, rstd, offset, weight_grad, added)
    return dx, dweight


def layer_norm_forward(
    x: Float[Tensor, "*batch d"],
    weight: Float[Tensor, " d"],
    bias: Float[Tensor, " d"],
    eps: float,
    *,
    backend: str | None = None,
) -> tuple[Float[Tensor, "*batch d"], Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Return ``(x - mean) / sqrt(var + eps) * weight + bias``, and each row's mean and reciprocal standard deviation.

    These two are float32; the output is computed in float32 and rounded once. Raises ShapeError if weight or bias does
    not fit x. Source: Ba et al. 2016, arXiv 1607.06450.
    """
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
    added: Float[Tensor, "*batch d"] | None = None,
    backend: str | None = None,
) -> tuple[Float[Tensor, "*batch d"], Float[Tensor, " d"] | None, Float[Tensor, " d"] | None]:
    """Return the gradients of `layer_norm_forward` with respect to x and, if ``weight_grad``, to weight and bias.

    If ``added`` is given, it is added to the gradient with respect to x.
    """
    _check(x, added, weight=weight)
    kernel = implementation("norm.layer_norm_backward", x.device, backend)
    dx, dweight, dbias = kernel(dy, x, weight, mean, rstd, weight_grad, added)
    return dx, dweight, dbias


def _check(x: Tensor, added: Tensor | None = None, **vectors: Tensor) -> None:
    if added is not None and (added.shape != x.shape or added.dtype != x.dtype):
        raise ShapeError(
            f"the gradient to add is {tuple(added.shape)} {added.dtype}, and x {tuple(x.shape)} {x.dtype}: give one "
            "like x"
        )
    wrong = {name: tuple(v.shape) for name, v in vectors.items() if tuple(v.shape) != tuple(x.shape[-1:])}
    if wrong:
        raise ShapeError(
            f"x has shape {tuple(x.shape)}, so {', '.join(wrong)} must have shape {tuple(x.shape[-1:])}: {wrong}"
        )
