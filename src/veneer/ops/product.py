"""Products with a fixed matrix under autograd: nothing but what multiplies is kept for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Multiply = Callable[[Tensor, bool], Tensor]
"""``W x``, or where the second argument is True ``Wᵀ x``, on the last axis."""


def recorded_product(x: Tensor, multiply: Multiply, transposed: bool) -> Tensor:
    """``multiply(x, transposed)``, differentiable in x as often as one likes."""
    y: Tensor = _Product.apply(x, multiply, transposed)  # type: ignore[no-untyped-call]
    return y


class _Product(torch.autograd.Function):
    """``W x`` or ``Wᵀ x``; each is the other's derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, multiply: Multiply, transposed: bool) -> Tensor:
        ctx.multiply, ctx.transposed = multiply, transposed
        return multiply(x, transposed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return recorded_product(grads[0], ctx.multiply, not ctx.transposed), None, None
