"""The low-rank product of a mixed batch: every row has an adapter of its own, or none; ranks differ.

``y[n] = onto[n] + scale_k B_k A_k x[n]`` with ``k = row_to_adapter[n]``: the SGMV of Chen et al. 2023 (arXiv
2310.18547), with gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veneer.errors import ShapeError
from veneer.ops.dispatch import implementation


@dataclass(frozen=True, slots=True)
class LowRankGroup:
    """What a back end sees: pairs ``a[k] (r_k, i)``, ``b[k] (o, r_k)``, scales, and the pair of each row (-1: none)."""

    a: tuple[Tensor, ...]
    b: tuple[Tensor, ...]
    scales: tuple[float, ...]
    row_to_adapter: Int[Tensor, " n"]

    @property
    def out_features(self) -> int:
        return self.b[0].shape[0]


def grouped_low_rank(
    x: Float[Tensor, "n i"],
    a_list: Sequence[Float[Tensor, "_ i"]],
    b_list: Sequence[Float[Tensor, "o _"]],
    scales: Sequence[float],
    row_to_adapter: Int[Tensor, " n"],
    *,
    onto: Float[Tensor, "n o"] | None = None,
    backend: str | None = None,
) -> Float[Tensor, "n o"]:
    """``onto + scale * B A x`` with each row's own adapter, in onto's dtype; without ``onto`` that part alone, in x's.

    ``row_to_adapter`` indexes the lists, in any order; a row with -1 has no adapter and an adapter may have no rows.
    Factors may be wider than x (float32 beside bf16): where the CPU multiplies bf16 tiles, they are rounded to it for
    the product with a bf16 x. Sums are float32 and rounded once. The gradient flows to x, onto, every a and every b,
    each in its own dtype. Raises ShapeError where something does not fit.
    """
    _check(x, a_list, b_list, scales, row_to_adapter)
    if onto is not None and onto.shape != (x.shape[0], b_list[0].shape[0]):
        raise ShapeError(f"onto is {tuple(onto.shape)}; the product is {(x.shape[0], b_list[0].shape[0])}")
    how = (tuple(scales), row_to_adapter, backend)
    out: Tensor = _GroupedLowRank.apply(x, onto, how, *a_list, *b_list)  # type: ignore[no-untyped-call]
    return out


class _GroupedLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, onto: Tensor | None, how: tuple[tuple[float, ...], Tensor, str | None], *pairs: Tensor
    ) -> Tensor:
        scales, row_to_adapter, backend = how
        ctx.save_for_backward(x, row_to_adapter, *pairs)
        ctx.scales, ctx.backend, ctx.onto_dtype = scales, backend, None if onto is None else onto.dtype
        group = _group(pairs, scales, row_to_adapter)
        out: Tensor = implementation("grouped_low_rank.forward", x.device, backend)(x, group, onto)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, row_to_adapter, *pairs = ctx.saved_tensors
        kernel = implementation("grouped_low_rank.backward", x.device, ctx.backend)
        dx, das, dbs = kernel(dy, x, _group(pairs, ctx.scales, row_to_adapter), ctx.needs_input_grad[0])
        grads = (g.to(p.dtype) for g, p in zip((*das, *dbs), pairs, strict=True))
        return dx, None if ctx.onto_dtype is None else dy, None, *grads


def _group(pairs: Sequence[Tensor], scales: tuple[float, ...], row_to_adapter: Tensor) -> LowRankGroup:
    half = len(scales)
    return LowRankGroup(tuple(pairs[:half]), tuple(pairs[half:]), scales, row_to_adapter)


def _check(
    x: Tensor, a_list: Sequence[Tensor], b_list: Sequence[Tensor], scales: Sequence[float], row_to_adapter: Tensor
) -> None:
    if not len(a_list) == len(b_list) == len(scales) or not a_list:
        raise ShapeError(
            f"grouped_low_rank takes one a, b and scale per adapter, and at least one adapter; given {len(a_list)}, "
            f"{len(b_list)} and {len(scales)}"
        )
    wrong = [
        f"adapter {j}: a {tuple(a.shape)}, b {tuple(b.shape)}"
        for j, (a, b) in enumerate(zip(a_list, b_list, strict=True))
        if a.shape[1] != x.shape[1] or b.shape != (b_list[0].shape[0], a.shape[0])
    ]
    if wrong or row_to_adapter.shape != x.shape[:1]:
        raise ShapeError(
            f"x is {tuple(x.shape)} and row_to_adapter {tuple(row_to_adapter.shape)}; a (r, {x.shape[1]}) goes with "
            f"b ({b_list[0].shape[0]}, r). " + "; ".join(wrong)
        )
    if len(row_to_adapter) and not (int(row_to_adapter.min()) >= -1 and int(row_to_adapter.max()) < len(a_list)):
        raise ShapeError(f"row_to_adapter holds indices below -1 or above the {len(a_list)} adapters")
