"""Low-rank parts of layers that share their input: one record for all rows, or one for each run of rows.

``core`` and ``b_scale`` are multiplied into B when B is rounded for the product. That takes o r multiplications; on
the activations it would take n r and n o. On a CPU the pair's scale is multiplied into B too. On a GPU the
products apply the scale, one launch rounds all factors, and the backward pass keeps them: ``r (i + o)`` numbers a pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.ops.grouped_low_rank import LowRankGroup, add_grouped_low_rank, grouped_low_rank_backward
from veneer.ops.linear.layer import LinearLayer
from veneer.ops.matmul import add_matmul, converted, matmul
from veneer.records.terms.pair import Pair

FactorGradients = dict[str, Tensor | None]
"""In the tensors of one pair, by their fields."""


@dataclass(frozen=True, slots=True)
class LowRankGradients:
    """Gradients with respect to the input of A, if requested, and to the tensors of each record's pair, by layer."""

    x: Tensor | None
    factors: list[list[FactorGradients]]


def add_low_rank(
    x: Float[Tensor, "n i"],
    read: Float[Tensor, "n i"],
    zs: Sequence[Float[Tensor, "n _"]],
    layers: Sequence[LinearLayer],
) -> Tensor:
    """Add ``scale * b_scale * B (core * A x)`` to ``zs``, the outputs of layers, in place.

    Return one tensor for `low_rank_backward` (its ``kept``): ``A x`` of all layers, on a GPU behind rounded factors.
    ``read`` is x as `ops.matmul.operand` gives it. `LinearLayer.goes_by_rows` is True for all layers, or for none.
    """
    if layers[0].goes_by_rows:
        return add_grouped_low_rank(x, [_group(layer) for layer in layers], layers[0].runs_of(len(x)), zs)
    if x.is_cuda:
        kept = _with_factors(x, layers)
        u, a, bs, scales = _operands(kept, len(x), layers)
        matmul(read, a.T, x.dtype, out=u)
    else:
        a, bs, scales = _rounded(layers, x.dtype)
        kept = u = matmul(read, a.T, x.dtype)
    for z, b, scale, span in zip(zs, bs, scales, _spans(layers), strict=True):
        add_matmul(z, u[:, span], b.T, scale)
    return kept


def low_rank_backward(
    dzs: Sequence[tuple[Float[Tensor, "n _"], Float[Tensor, "n _"]]],
    x: Float[Tensor, "n i"],
    kept: Tensor,
    layers: Sequence[LinearLayer],
    input_grad: bool,
) -> LowRankGradients:
    """Return the gradients of `add_low_rank`. ``kept`` is the tensor that it returned.

    ``dzs``: the gradient with respect to each layer's output, and the `ops.matmul.operand` of this gradient.
    """
    if layers[0].goes_by_rows:
        return _of_rows([dz for dz, _ in dzs], x, kept, layers, input_grad)
    du, dx = input_gradients(dzs, kept, layers, input_grad)
    return LowRankGradients(dx, factor_gradients(dzs, du, x, kept, layers))


def input_gradients(
    dzs: Sequence[tuple[Tensor, Tensor]], kept: Tensor, layers: Sequence[LinearLayer], input_grad: bool
) -> tuple[Tensor, Float[Tensor, "n i"] | None]:
    """Return the gradient with respect to ``A x`` of all layers and, if ``input_grad``, the gradient with respect to x.

    One record must act on all rows. ``dzs`` and ``kept`` as in `low_rank_backward`.
    """
    u, a, bs, scales = _operands(kept, len(dzs[0][0]), layers)
    du = torch.empty_like(u)
    for b, scale, span, (_, read) in zip(bs, scales, _spans(layers), dzs, strict=True):
        matmul(read, b, u.dtype, out=du[:, span], scale=scale)
    return du, matmul(du, a, du.dtype) if input_grad else None


def factor_gradients(
    dzs: Sequence[tuple[Tensor, Tensor]],
    du: Tensor,
    x: Float[Tensor, "n i"],
    kept: Tensor,
    layers: Sequence[LinearLayer],
) -> list[list[FactorGradients]]:
    """Return the gradients in the factors of each layer's record. ``du`` is the first result of `input_gradients`."""
    pairs, spans = [_pair_of(layer) for layer in layers], _spans(layers)
    u = _parts(kept, len(x), pairs)[0] if kept.is_cuda else kept
    da = matmul(du.T, x, x.dtype) if any(pair.a.requires_grad for pair in pairs) else None
    wanted = [(k, "a", pair.a, cast(Tensor, da)[spans[k]]) for k, pair in enumerate(pairs) if pair.a.requires_grad]
    wanted += [
        (k, "b", pair.b, _b_gradient(u[:, spans[k]], dzs[k][1], x.dtype, _scale_of(layers[k], 0)))
        for k, pair in enumerate(pairs)
        if _trains_b(pair)
    ]
    found = converted([gradient for *_, gradient in wanted], [like.dtype for _, _, like, _ in wanted])
    dbs = {k: gradient for (k, name, _, _), gradient in zip(wanted, found, strict=True) if name == "b"}
    if dbs and not x.is_cuda:
        torch._foreach_mul_(list(dbs.values()), [_scale_of(layers[k], 0) for k in dbs])
    factors: list[FactorGradients] = [{"a": None} for _ in layers]
    for (k, name, _, _), gradient in zip(wanted, found, strict=True):
        factors[k] |= {"a": gradient} if name == "a" else _parted(gradient, pairs[k])
    return [[each] for each in factors]


def _b_gradient(
    u: Float[Tensor, "n r"], read: Float[Tensor, "n o"], dtype: torch.dtype, scale: float
) -> Float[Tensor, "o r"]:
    """Return the gradient (o, r) with respect to B. On a GPU it includes the pair's ``scale`` and has B's strides, so
    that autograd makes no copy.
    """
    return matmul(read.T, u, dtype, scale=scale) if read.is_cuda else matmul(u.T, read, dtype).T


def _of_rows(
    dzs: Sequence[Tensor], x: Tensor, u: Tensor, layers: Sequence[LinearLayer], input_grad: bool
) -> LowRankGradients:
    groups = [_group(layer) for layer in layers]
    dx, das, dbs = grouped_low_rank_backward(dzs, x, u, groups, layers[0].runs_of(len(x)), input_grad=input_grad)
    factors = [
        [_of_pair(da, db, record.low_rank) for da, db, record in zip(own_das, own_dbs, layer.records, strict=True)]
        for own_das, own_dbs, layer in zip(das, dbs, layers, strict=True)
    ]
    return LowRankGradients(dx, factors)


def _of_pair(da: Tensor | None, db: Tensor | None, pair: Pair | None) -> FactorGradients:
    if pair is None or da is None or db is None:
        return {}
    found: FactorGradients = {"a": da.to(pair.a.dtype) if pair.a.requires_grad else None}
    return found | _parted(db.to(pair.b.dtype), pair) if _trains_b(pair) else found


def _trains_b(pair: Pair) -> bool:
    """Return True if a factor other than A is trained."""
    return any(t is not None and t.requires_grad for t in (pair.core, pair.b, pair.b_scale))


def _parted(gradient: Float[Tensor, "o r"], pair: Pair) -> FactorGradients:
    """Return the gradients with respect to core, b and b_scale, given the gradient of ``diag(b_scale) B diag(core)``.
    Factors that are not trained are left out.
    """
    if pair.is_plain:
        return {"b": gradient}
    found: FactorGradients = {}
    rows = gradient if pair.b_scale is None else gradient * pair.b_scale[:, None]
    if pair.core is not None and pair.core.requires_grad:
        found["core"] = (rows * pair.b).sum(dim=0)
    if pair.b_scale is not None and pair.b_scale.requires_grad:
        found["b_scale"] = ((gradient if pair.core is None else gradient * pair.core) * pair.b).sum(dim=1)
    if pair.b.requires_grad:
        found["b"] = rows if pair.core is None else rows * pair.core
    return found


def _pair_of(layer: LinearLayer) -> Pair:
    """Return the pair of a layer that has one pair for all rows."""
    return cast(Pair, layer.record.low_rank)


def _group(layer: LinearLayer) -> LowRankGroup:
    pairs = [record.low_rank for record in layer.records]
    a = tuple(None if pair is None else pair.a for pair in pairs)
    b = tuple(None if pair is None else pair.plain_b for pair in pairs)
    return LowRankGroup(a, b, tuple(_scale_of(layer, k) for k in range(len(pairs))), layer.masks)


def _operands(
    kept: Tensor, n_rows: int, layers: Sequence[LinearLayer]
) -> tuple[Tensor, Tensor, list[Tensor], list[float]]:
    """Return ``A x`` of all layers, which `add_low_rank` kept, and the factors and numbers that `_rounded` returns.

    The numbers are the pairs' scales on a GPU.
    """
    if not kept.is_cuda:
        return kept, *_rounded(layers, kept.dtype)
    return *_parts(kept, n_rows, [_pair_of(layer) for layer in layers]), [_scale_of(layer, 0) for layer in layers]


def _with_factors(x: Float[Tensor, "n i"], layers: Sequence[LinearLayer]) -> Tensor:
    """Return memory for the factors of all layers in x's dtype, which one launch writes, and for ``A x`` behind them.
    Scales are not in the factors.
    """
    pairs = [_pair_of(layer) for layer in layers]
    rank = sum(pair.rank for pair in pairs)
    kept = x.new_empty(rank * (len(x) + x.shape[1]) + sum(pair.b.numel() for pair in pairs))
    _, a, bs = _parts(kept, len(x), pairs)
    places = [*torch.split(a, [pair.rank for pair in pairs]), *bs]
    torch._foreach_copy_(places, [*(pair.a for pair in pairs), *(pair.plain_b for pair in pairs)])
    return kept


def _parts(
    kept: Tensor, n_rows: int, pairs: Sequence[Pair]
) -> tuple[Float[Tensor, "n r"], Float[Tensor, "r i"], list[Tensor]]:
    """Return views of the memory that `_with_factors` returned: ``A x``, the stacked A, and each layer's B."""
    rank, i = sum(pair.rank for pair in pairs), pairs[0].a.shape[1]
    a, *bs, u = torch.split(kept, [rank * i, *(pair.b.numel() for pair in pairs), rank * n_rows])
    return u.view(n_rows, rank), a.view(rank, i), [b.view(pair.b.shape) for b, pair in zip(bs, pairs, strict=True)]


def _rounded(layers: Sequence[LinearLayer], dtype: torch.dtype) -> tuple[Tensor, list[Tensor], list[float]]:
    """Return for a CPU the A of all layers, stacked, and each layer's B, both in ``dtype``, and the number by which
    each layer's product must be multiplied. This is 1, because the scale is already in B.
    """
    factors, scales = [_pair_of(layer).a for layer in layers], [_scale_of(layer, 0) for layer in layers]
    joined = factors[0].new_empty(sum(map(len, factors)), factors[0].shape[1], dtype=dtype)
    parts, bs = torch.split(joined, [len(a) for a in factors]), [_pair_of(layer).plain_b for layer in layers]
    torch._foreach_copy_(list(parts), factors)
    return joined, converted(torch._foreach_mul(bs, scales), [dtype] * len(bs)), [1.0] * len(bs)


def _spans(layers: Sequence[LinearLayer]) -> list[slice]:
    """Return for each layer the slice of its columns in the product of x with the A of all layers."""
    ranks = [layer.record.rank for layer in layers]
    return [slice(end - rank, end) for rank, end in zip(ranks, accumulate(ranks), strict=True)]


def _scale_of(layer: LinearLayer, k: int) -> float:
    """Return the scale of record k's pair, times the scale of the inputs that its dropout mask keeps; a missing pair or
    mask counts as 1.
    """
    mask, pair = layer.mask_of(k), layer.records[k].low_rank
    return (1.0 if pair is None else pair.scale) * (1.0 if mask is None else mask.scale)
