"""Dropout in front of A: which values of a layer's input a record does not see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from veneer.ops.dropout import add_dropped, drop, keep_scale


@dataclass(frozen=True, slots=True)
class Mask:
    """Drops values at the rate ``p``; which ones, the 64-bit ``key``, a row's id and the column tell alone.

    ``ids`` are those of all rows of the batch, whether or not their record is this one.
    """

    p: float
    key: int
    ids: Int64[Tensor, " n"]

    @property
    def scale(self) -> float:
        """By which what is kept is multiplied: 1 / (1 - p)."""
        return keep_scale(self.p)

    def drop(self, x: Float[Tensor, "m i"], rows: slice = slice(None)) -> Float[Tensor, "m i"]:
        """x, which are these rows of the batch, with some values set to zero; what is kept is not scaled."""
        return drop(x, self.p, self.key, self.ids[rows])

    def add_to(self, dx: Float[Tensor, "m i"], g: Float[Tensor, "m i"], rows: slice = slice(None)) -> None:
        """Add the gradient in x, given that in what `drop` made of it, to dx in place."""
        add_dropped(dx, g, self.p, self.key, self.ids[rows])


def dropout(x: Float[Tensor, "*batch i"], mask: Mask) -> Float[Tensor, "*batch i"]:
    """Dropout on x under autograd, what is kept scaled up. The mask is drawn again in the backward pass."""
    y: Tensor = _Dropout.apply(x.reshape(-1, x.shape[-1]), mask)  # type: ignore[no-untyped-call]
    return y.view(x.shape)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Mask) -> Tensor:
        ctx.mask = mask
        return mask.drop(x).mul_(mask.scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return dropout(grads[0], ctx.mask), None
