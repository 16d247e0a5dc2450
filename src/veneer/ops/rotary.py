"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864): pairs of features rotated by their position's angle."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.errors import ShapeError
from veneer.ops.dispatch import implementation


def rotary(
    q: Float[Tensor, "b q_heads t d"],
    k: Float[Tensor, "b kv_heads t d"],
    cos: Float[Tensor, "#b t half"],
    sin: Float[Tensor, "#b t half"],
    *,
    interleaved: bool = False,
    backend: str | None = None,
) -> tuple[Float[Tensor, "b q_heads t d"], Float[Tensor, "b kv_heads t d"]]:
    """Return queries and keys rotated by their positions' angles: the first ``2 * half`` features; the rest are
    unchanged.

    A pair is features j and j + half (the layout of Llama and GPT-NeoX), or 2j and 2j + 1 if ``interleaved``. ``cos``
    and ``sin`` hold one value per pair: of transformers' tables, the first half of the last axis. Computed in float32,
    rounded once. Raises ShapeError if the tables do not fit.
    """
    return _Rotary.apply(q, cos, sin, interleaved, backend), _Rotary.apply(k, cos, sin, interleaved, backend)  # type: ignore[no-untyped-call]


def rotate(
    x: Float[Tensor, "b heads t d"],
    cos: Float[Tensor, "#b t half"],
    sin: Float[Tensor, "#b t half"],
    *,
    interleaved: bool = False,
    inverse: bool = False,
    in_place: bool = False,
    backend: str | None = None,
) -> Float[Tensor, "b heads t d"]:
    """Return x rotated by the tables' angles, or back if ``inverse``; each is the backward of the other.

    Strides are arbitrary, so a projection's output (b, t, heads, d) can be rotated through its transposed view.
    ``in_place`` overwrites x and returns it.
    """
    _check(x, cos, sin)
    kernel = implementation("rotary.rotate", x.device, backend)
    out: Tensor = kernel(x, cos, -sin if inverse else sin, interleaved, in_place)
    return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, backend: str | None) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved, ctx.backend = interleaved, backend
        return rotate(x, cos, sin, interleaved=interleaved, backend=backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        dx = rotate(dy, cos, sin, interleaved=ctx.interleaved, inverse=True, backend=ctx.backend)
        return dx, None, None, None, None


def _check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    fits = (
        x.ndim == 4
        and cos.ndim == 3
        and cos.shape == sin.shape
        and cos.shape[0] in (1, x.shape[0])
        and cos.shape[1] == x.shape[2]
        and 2 * cos.shape[2] <= x.shape[3]
    )
    if not fits:
        raise ShapeError(
            f"rotary takes x (b, heads, t, d) with cos and sin (b or 1, t, half), 2 * half <= d; given x "
            f"{tuple(x.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}"
        )
