"""Columns scaled and shifted, ``y = scale * z + bias``: the terms of a record around its products, with gradients.

Scales and biases are not rounded to z's dtype. A result is computed in the widest of the three dtypes, float32 at
least, and rounded once.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.errors import ShapeError
from veneer.ops.dispatch import implementation


def scale_columns(
    z: Float[Tensor, "n d"],
    scale: Float[Tensor, " d"] | None,
    bias: Float[Tensor, " d"] | None,
    out: Float[Tensor, "n d"] | None = None,
    *,
    backend: str | None = None,
) -> Float[Tensor, "n d"]:
    """Return ``scale * z + bias`` in z's dtype, written into ``out``, which may be z.

    If ``scale`` is None, it counts as one; if ``bias`` is None, as zero. Raises ShapeError if something does not fit z.
    """
    y = torch.empty_like(z) if out is None else out
    _check(z, y, scale, bias)
    if not z.numel():
        return y
    if scale is None and bias is None:
        return y.copy_(z)
    implementation("scale.forward", z.device, backend)(z, scale, bias, y)
    return y


def scale_columns_backward(
    dy: Float[Tensor, "n d"],
    z: Float[Tensor, "n d"] | None,
    scale: Float[Tensor, " d"] | None,
    dz: Float[Tensor, "n d"] | None,
    *,
    with_bias: bool = False,
    backend: str | None = None,
) -> tuple[Float[Tensor, " d"] | None, Float[Tensor, " d"] | None]:
    """Return the gradients of `scale_columns` in the scale, if z is given, and in the bias, in at least float32.

    The gradient in z, ``scale * dy``, is written into ``dz``, which may be dy. Without a scale it is dy, and dz is
    None. Raises ShapeError if something does not fit dy.
    """
    if (scale is None) != (dz is None) or (scale is None and z is not None):
        raise ShapeError(
            "z and dz are given without a scale: the gradient in z is dy then. Give the scale, or leave both out"
        )
    _check(dy, dy if dz is None else dz, scale, None)
    if z is not None and (z.shape != dy.shape or z.dtype != dy.dtype):
        raise ShapeError(f"dy is {tuple(dy.shape)} {dy.dtype}, and z {tuple(z.shape)} {z.dtype}: they must be alike")
    if not dy.numel():
        zeros = dy.new_zeros(dy.shape[1], dtype=torch.promote_types(dy.dtype, torch.float32))
        return None if z is None else zeros, zeros.clone() if with_bias else None
    kernel = implementation("scale.backward", dy.device, backend)
    dscale, dbias = kernel(dy, z, scale, dz, with_bias)
    return dscale, dbias


def _check(z: Tensor, y: Tensor, scale: Tensor | None, bias: Tensor | None) -> None:
    if y.shape != z.shape or y.dtype != z.dtype:
        raise ShapeError(
            f"the result must have the shape and dtype of the scaled tensor; given {tuple(z.shape)} {z.dtype} and "
            f"{tuple(y.shape)} {y.dtype}"
        )
    for name, vector in (("scale", scale), ("bias", bias)):
        if vector is not None and vector.shape != z.shape[1:]:
            raise ShapeError(f"the {name} must be ({z.shape[1]},), one value a column; given {tuple(vector.shape)}")
