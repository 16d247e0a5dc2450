"""Products with a fixed matrix under autograd: the backward pass keeps nothing but the fixed matrix."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
from torch import Tensor

from veneer.ops.traced import is_watched

Multiply = Callable[[Tensor, bool], Tensor]
"""``W x``, or where the second argument is True ``Wᵀ x``, on the last axis."""

NAMESPACE = "veneer"
P = ParamSpec("P")
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]


def visible(schema: str) -> Callable[[Callable[P, Tensor]], Callable[P, Tensor]]:
    """Register a product as an op of torch, so that selective checkpointing can keep its result.

    Selective checkpointing is a mode of torch's dispatcher, which does not see veneer's kernels. It cannot keep results
    that are written in place. The first argument is the operand. If no mode watches the dispatcher, a call runs the
    function directly, because the dispatcher takes time, and because a transform without a rule for the op would pass
    through it without an error.
    """

    def register(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
        _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
        _LIBRARY.impl(function.__name__, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        op: Callable[P, Tensor] = getattr(torch.ops.veneer, function.__name__).default

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> Tensor:
            return (op if is_watched() else function)(*args, **kwargs)

        return call

    return register


def recorded_product(x: Tensor, multiply: Multiply, transposed: bool) -> Tensor:
    """Return ``multiply(x, transposed)``, differentiable in x any number of times."""
    y: Tensor = _Product.apply(x, multiply, transposed)  # type: ignore[no-untyped-call]
    return y


class _Product(torch.autograd.Function):
    """Function ``W x`` or ``Wᵀ x`` of x with a fixed W. The backward pass of each is the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, multiply: Multiply, transposed: bool) -> Tensor:
        ctx.multiply, ctx.transposed = multiply, transposed
        return multiply(x, transposed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return recorded_product(grads[0], ctx.multiply, not ctx.transposed), None, None
