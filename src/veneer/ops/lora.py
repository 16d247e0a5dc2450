"""LoRA on frozen linear layers (Hu et al. 2021, arXiv 2106.09685) with hand-written backward in the compute dtype.

``y = W x + bias + scale * B A x``. Layers that read the same x (q, k, v; gate and up) go through one call: their A's
are joined, so x is read once, and what is kept for the backward is x and the ``A x`` of all of them, r values a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.errors import ShapeError
from veneer.ops.lora_rows import add_low_rank_rows, low_rank_rows_backward
from veneer.ops.matmul import add_matmul, matmul, operand
from veneer.ops.projection import Projection as Projection  # from here for those who use it
from veneer.ops.projection import Weight, factors_of


@dataclass(frozen=True, slots=True)
class LoraGradients:
    """Gradients of `lora_forward`: in x (None where not asked for), and in the factors as `factors_of` lists them."""

    x: Tensor | None
    factors: tuple[Tensor | None, ...]


def lora_linear(x: Float[Tensor, "*batch i"], projection: Projection) -> Float[Tensor, "*batch o"]:
    """One adapted layer under autograd: the gradient flows to x, a and b."""
    return lora_linears(x, [projection])[0]


def lora_linears(
    x: Float[Tensor, "*batch i"], projections: Sequence[Projection]
) -> tuple[Float[Tensor, "*batch _"], ...]:
    """The outputs of adapted layers that share their input, under autograd.

    Raises ShapeError where a projection does not fit x.
    """
    _check(x, projections)
    factors = factors_of(projections)
    ys: tuple[Tensor, ...] = _LoraLinears.apply(x.reshape(-1, x.shape[-1]), tuple(projections), *factors)  # type: ignore[no-untyped-call]
    return tuple(y.reshape(*x.shape[:-1], -1) for y in ys)


def lora_forward(
    x: Float[Tensor, "n i"], projections: Sequence[Projection]
) -> tuple[tuple[Float[Tensor, "n _"], ...], Tensor | None]:
    """The outputs, and the joined ``A x`` that `lora_backward` reads (None where no projection has a low-rank pair)."""
    if any(p.rows is not None for p in projections):
        outputs = [_product(x, operand(x), p.weight) for p in projections]
        by_rows = add_low_rank_rows(x, outputs, projections)
        biased = (y if p.bias is None else y.add_(p.bias) for y, p in zip(outputs, projections, strict=True))
        return tuple(biased), by_rows
    joined, read = _joined_a(projections, x.dtype), operand(x)
    u = None if joined is None else matmul(read, joined.T, x.dtype)
    ys = []
    for p, span in zip(projections, _spans(projections), strict=True):
        y = _product(x, read, p.weight)
        if u is not None and p.b is not None:
            add_matmul(y, u[:, span], _scaled_b(p, x.dtype).T)
        ys.append(y if p.bias is None else y.add_(p.bias))
    return tuple(ys), u


def lora_backward(
    dys: Sequence[Float[Tensor, "n _"]],
    x: Float[Tensor, "n i"],
    u: Tensor | None,
    projections: Sequence[Projection],
    *,
    input_grad: bool = True,
) -> LoraGradients:
    """Gradients of `lora_forward` from the outputs' gradients, x, and the u that the forward returned."""
    dx: Tensor | None = None
    factors: tuple[Tensor | None, ...] = (None,) * len(factors_of(projections))
    if any(p.rows is not None for p in projections) and u is not None:
        dx, factors = low_rank_rows_backward(dys, x, u, projections, input_grad)
    read = [operand(dy) for dy in dys]
    if u is not None and all(p.rows is None for p in projections):
        dx, factors = _low_rank_backward(read, x, u, projections, input_grad)
    for p, dy, wide in zip(projections, dys, read, strict=True):
        dx = _add_transposed(dx, dy, wide, p.weight) if input_grad else None
    return LoraGradients(dx, factors)


def _low_rank_backward(
    dys: Sequence[Tensor], x: Tensor, u: Tensor, projections: Sequence[Projection], input_grad: bool
) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
    dbs: list[Tensor | None] = [None] * len(projections)
    joined = _joined_a(projections, x.dtype)
    assert joined is not None  # there is a u
    du = torch.empty_like(u)
    for index, (p, span, dy) in enumerate(zip(projections, _spans(projections), dys, strict=True)):
        if p.b is not None:
            matmul(dy, _scaled_b(p, x.dtype), x.dtype, out=du[:, span])
            dbs[index] = matmul(u[:, span].T, dy, x.dtype).T.to(p.b.dtype).mul_(p.scale)
    da = matmul(du.T, x, x.dtype)
    das = (
        None if p.a is None else da[span].to(p.a.dtype)
        for p, span in zip(projections, _spans(projections), strict=True)
    )
    factors = tuple(factor for pair in zip(das, dbs, strict=True) for factor in pair)
    return matmul(du, joined, x.dtype) if input_grad else None, factors


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, projections: tuple[Projection, ...], *factors: Tensor | None
    ) -> tuple[Tensor, ...]:
        ys, u = lora_forward(x, projections)
        ctx.save_for_backward(x, u)
        ctx.projections = projections
        return ys

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, u = ctx.saved_tensors
        grads = lora_backward(dys, x, u, ctx.projections, input_grad=ctx.needs_input_grad[0])
        return grads.x, None, *grads.factors


def _product(x: Tensor, read: Tensor, weight: Weight) -> Tensor:
    return matmul(read, weight.T, x.dtype) if isinstance(weight, Tensor) else weight.matmul(x)


def _joined_a(projections: Sequence[Projection], dtype: torch.dtype) -> Tensor | None:
    parts = [p.a.to(dtype) for p in projections if p.a is not None]
    return torch.cat(parts) if parts else None


def _spans(projections: Sequence[Projection]) -> list[slice]:
    """The columns of u that belong to each projection."""
    ranks = [0 if p.a is None else p.a.shape[0] for p in projections]
    ends = list(accumulate(ranks))
    return [slice(end - rank, end) for rank, end in zip(ranks, ends, strict=True)]


def _scaled_b(projection: Projection, dtype: torch.dtype) -> Tensor:
    assert projection.b is not None  # the callers asked
    return (projection.b * projection.scale).to(dtype)


def _add_transposed(dx: Tensor | None, dy: Tensor, read: Tensor, weight: Weight) -> Tensor:
    """``dx + Wᵀ dy``; a dense weight adds inside its product."""
    if isinstance(weight, Tensor):
        return matmul(read, weight, dy.dtype) if dx is None else add_matmul(dx, read, weight)
    return weight.matmul_t(dy) if dx is None else dx.add_(weight.matmul_t(dy))


def _check(x: Tensor, projections: Sequence[Projection]) -> None:
    problems = []
    for index, p in enumerate(projections):
        out_features, in_features = p.weight.shape
        if in_features != x.shape[-1]:
            problems.append(f"weight {index} is {(out_features, in_features)}")
        if (p.a is None) != (p.b is None):
            problems.append(f"projection {index} has one of a and b: give both or neither")
        elif p.a is not None and p.b is not None:
            rank = p.a.shape[0]
            if tuple(p.a.shape) != (rank, in_features) or tuple(p.b.shape) != (out_features, rank):
                problems.append(f"a and b of projection {index} are {tuple(p.a.shape)} and {tuple(p.b.shape)}")
    if problems or not projections:
        raise ShapeError(f"x has {x.shape[-1]} features: " + ("; ".join(problems) or "no projection was given"))
