"""The one formula of `records.LinearDelta`: applied, folded and composed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veneer.core.frozen import FrozenWeight
from veneer.core.records import LinearDelta
from veneer.errors import CompositionError

BLOCK_VALUES = 1 << 18


def apply_linear(
    delta: LinearDelta,
    x: Float[Tensor, "*batch i"],
    weight: FrozenWeight,
    bias: Float[Tensor, " o"] | None = None,
    lowrank_input: Float[Tensor, "*batch i"] | None = None,
) -> Float[Tensor, "*batch o"]:
    """The adapted layer's output, in the dtype of the base product.

    ``lowrank_input`` stands in for x in front of A alone: that is where dropout acts. What the record adds or scales is
    computed in the record's dtype (float32 beside a 16-bit base, unless autocast says otherwise) and rounded once, at
    the end: rounded to 16 bits itself, a scale of 1.005 would act as 1.0078.
    """
    return _apply(delta, [(delta, lowrank_input)], x, weight, bias)


def apply_linear_sum(
    deltas: Sequence[LinearDelta],
    x: Float[Tensor, "*batch i"],
    weight: FrozenWeight,
    bias: Float[Tensor, " o"] | None,
    lowrank_inputs: Sequence[Float[Tensor, "*batch i"] | None],
) -> Float[Tensor, "*batch o"]:
    """`apply_linear` of what `compose_linear` makes of the records, each with an input of its own in front of its A.

    Raises CompositionError where they cannot act together.
    """
    return _apply(compose_linear(deltas, bias), list(zip(deltas, lowrank_inputs, strict=True)), x, weight, bias)


def _apply(
    whole: LinearDelta,
    parts: Sequence[tuple[LinearDelta, Tensor | None]],
    x: Tensor,
    weight: FrozenWeight,
    bias: Tensor | None,
) -> Tensor:
    """The base product with the low-rank parts added and everything else taken from ``whole``, rounded once."""
    base_input = scaled(x, whole.in_scale)
    y = base = weight.matmul(base_input)
    for part, own_input in parts:
        if part.a is not None and part.b is not None:
            source = base_input if own_input is None else scaled(own_input, whole.in_scale)
            y = y + behind_a(torch.nn.functional.linear(source.to(part.a.dtype), part.a), part)
    return _finished(whole, y, bias).to(base.dtype)


def apply_projected(
    whole: LinearDelta,
    parts: Sequence[tuple[LinearDelta, Float[Tensor, "*batch _"]]],
    base: Float[Tensor, "*batch o"],
    bias: Float[Tensor, " o"] | None = None,
) -> Float[Tensor, "*batch o"]:
    """`apply_linear_sum` where the caller has the products with the input: ``base`` is W x, and beside each record is
    its A x, both of the scaled input. That is how a convolution is applied, whose input is patches that are never laid
    out.

    ``whole`` is what `compose_linear` makes of the records.
    """
    y = base
    for part, inner in parts:
        if part.b is not None:
            y = y + behind_a(inner, part)
    return _finished(whole, y, bias).to(base.dtype)


def _finished(whole: LinearDelta, y: Tensor, bias: Tensor | None) -> Tensor:
    """The scale of the outputs and then the bias."""
    if whole.out_scale is not None:
        y = y * whole.out_scale
    offset = bias if whole.bias is None else whole.bias
    return y if offset is None else y + offset


def apply_embedding(
    delta: LinearDelta,
    token_ids: Int[Tensor, "*batch"],
    looked_up: Float[Tensor, "*batch o"],
    padding_idx: int | None = None,
) -> Float[Tensor, "*batch o"]:
    """The adapted embedding's output, given what the frozen table returned: `apply_linear` on one-hot rows, by look-up.

    A table that multiplies what it looks up (Gemma's) needs a record whose ``scale`` is multiplied likewise. As in
    torch's embedding, the column of A of the token ``padding_idx`` gets no gradient.
    """
    y = looked_up
    if delta.a is not None and delta.b is not None:
        columns = torch.nn.functional.embedding(token_ids, delta.a.T, padding_idx)
        y = y + behind_a(columns, delta)
    if delta.in_scale is not None:
        y = y * delta.in_scale[token_ids][..., None]
    if delta.out_scale is not None:
        y = y * delta.out_scale
    return (y if delta.bias is None else y + delta.bias).to(looked_up.dtype)


def behind_a(inner: Float[Tensor, "*batch r"], delta: LinearDelta) -> Float[Tensor, "*batch o"]:
    """``scale * b_scale * B (core * inner)`` of a record that has a low-rank part, ``inner`` being its A x.

    Rank first: the matrix ``B A`` is never formed.
    """
    scaled_inner = inner if delta.core is None else inner * delta.core
    y = torch.nn.functional.linear(scaled_inner, cast(Tensor, delta.b)) * delta.scale
    return y if delta.b_scale is None else y * delta.b_scale


def plain_b(delta: LinearDelta) -> Float[Tensor, "*experts o r"] | None:
    """``diag(b_scale) B diag(core)``: the B of a plain low-rank pair that does the same."""
    b = delta.b
    if b is None:
        return None
    b = b if delta.core is None else b * delta.core
    return b if delta.b_scale is None else b * delta.b_scale[:, None]


def plain(delta: LinearDelta) -> LinearDelta:
    """The same record without core and b_scale, which are multiplied into b."""
    if delta.core is None and delta.b_scale is None:
        return delta
    return replace(delta, b=plain_b(delta), core=None, b_scale=None)


def scaled(x: Float[Tensor, "*batch i"], scale: Float[Tensor, "*#batch i"] | None) -> Float[Tensor, "*batch i"]:
    """x times a scale (None is one), in x's dtype; the scale itself is never rounded to it."""
    return x if scale is None else (x * scale).to(x.dtype)


def fold_linear(
    delta: LinearDelta,
    weight: Float[Tensor, "*experts o i"],
    bias: Float[Tensor, " o"] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Float[Tensor, "*experts o i"], Float[Tensor, " o"] | None]:
    """``diag(out_scale) (W + scale B A) diag(in_scale)`` and the bias, in ``dtype`` (None: W's).

    Computed in at least float32, and outside of autograd a block of rows at a time, so that nothing but the result is
    as large as W.
    """
    dtype = dtype or weight.dtype
    if torch.is_grad_enabled() or weight.numel() <= BLOCK_VALUES:
        folded = _fold(delta, weight).to(dtype)
    else:
        folded = torch.empty_like(weight, dtype=dtype)
        places = row_blocks(weight)
        for rows, block in zip(places, fold_blocks(delta, (weight[rows] for rows in places), dtype), strict=True):
            folded[rows] = block
    new_bias = bias if delta.bias is None else delta.bias
    return folded, None if new_bias is None else new_bias.to(dtype)


def fold_blocks(
    delta: LinearDelta, weight: Iterable[Float[Tensor, "k *rest"]], dtype: torch.dtype
) -> Iterator[Float[Tensor, "k *rest"]]:
    """The weight of `fold_linear`, whose rows (or experts) are given in order, block by block; none is kept."""
    first = 0
    for block in weight:
        rows = slice(first, first + len(block))
        yield _fold(_of_rows(delta, rows), block).to(dtype)
        first = rows.stop


def transposed(delta: LinearDelta) -> LinearDelta:
    """The record that changes the transposed weight (i, o) as this one changes (o, i); there is no bias to it."""
    delta = plain(delta)
    a, b = (None if factor is None else factor.mT for factor in (delta.a, delta.b))
    return LinearDelta(a=b, b=a, scale=delta.scale, in_scale=delta.out_scale, out_scale=delta.in_scale)


def row_blocks(weight: Float[Tensor, "n *rest"]) -> list[slice]:
    """The rows of a weight (its experts, where they are stacked) in blocks of about `BLOCK_VALUES` values."""
    n_rows = max(1, BLOCK_VALUES // max(1, weight[0].numel()))
    return [slice(start, start + n_rows) for start in range(0, weight.shape[0], n_rows)]


def _fold(delta: LinearDelta, weight: Tensor) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    folded = weight.to(wide)
    b = plain_b(delta)
    if delta.a is not None and b is not None:
        folded = folded + (b.to(wide) @ delta.a.to(wide)) * delta.scale
    if delta.in_scale is not None:
        folded = folded * delta.in_scale.to(wide)
    if delta.out_scale is not None:
        folded = folded * delta.out_scale.to(wide)[:, None]
    return folded


def _of_rows(delta: LinearDelta, rows: slice) -> LinearDelta:
    """The part of a record that acts on some rows of the weight, or on some of its experts."""
    stacked = delta.a is not None and delta.a.ndim > 2
    return replace(
        delta,
        a=delta.a[rows] if delta.a is not None and stacked else delta.a,
        b=None if delta.b is None else delta.b[rows],
        b_scale=None if delta.b_scale is None else delta.b_scale[rows],
        out_scale=None if delta.out_scale is None else delta.out_scale[rows],
    )


def compose_linear(deltas: Sequence[LinearDelta], bias: Float[Tensor, " o"] | None = None) -> LinearDelta:
    """One record that acts as all of them together on one layer with the bias given.

    Low-rank parts are concatenated along the rank, which is their exact sum. Scales of inputs and outputs (IA3, DoRA)
    do not add up: such a record acts alone, or beside others where all are pure scales, which multiply.

    Raises CompositionError where the sum is not a LinearDelta.
    """
    if len(deltas) == 1:
        return deltas[0]
    scaled = [d for d in deltas if d.in_scale is not None or d.out_scale is not None]
    if scaled and any(d.rank or (d.bias is not None and d.out_scale is None) for d in deltas):
        raise CompositionError(
            f"{len(deltas)} adapters are active on one layer and {len(scaled)} of them scale its input or output "
            "(DoRA, IA3); such an update cannot be added to one that adds a low-rank part or a bias. Activate one of "
            "them at a time, merge one first, or combine them with add_weighted_adapter."
        )
    lowrank_parts = [plain(d) for d in deltas if d.rank]
    return LinearDelta(
        a=torch.cat([d.a for d in lowrank_parts if d.a is not None], dim=-2) if lowrank_parts else None,
        b=torch.cat([d.b * d.scale for d in lowrank_parts if d.b is not None], dim=-1) if lowrank_parts else None,
        in_scale=_product([d.in_scale for d in deltas]),
        out_scale=_product([d.out_scale for d in deltas]),
        bias=_sum_of_biases(deltas, bias, multiply=bool(scaled)),
    )


def row_norms(delta: LinearDelta, weight: FrozenWeight, weight_row_sq: Float[Tensor, " o"]) -> Float[Tensor, " o"]:
    """Euclidean norms of the rows of ``W + scale B A``, given those of W squared, without forming ``B A``.

    ``|w + s b A|² = |w|² + 2 s b·(A w) + s² b (A Aᵀ) bᵀ`` for each row w of W and b of B: a product of W with r rows
    and one of size (o, r, r).
    """
    a, b = delta.a, plain_b(delta)
    if a is None or b is None:
        return weight_row_sq.sqrt()
    cross = (weight.matmul(a).to(b.dtype).T * b).sum(dim=1)
    square = ((b @ (a @ a.T)) * b).sum(dim=1)
    total = weight_row_sq.to(b.dtype) + 2 * delta.scale * cross + delta.scale**2 * square
    return total.clamp_min(0).sqrt()


def _product(scales: Sequence[Tensor | None]) -> Tensor | None:
    present = [s for s in scales if s is not None]
    return torch.stack(present).prod(dim=0) if present else None


def _sum_of_biases(deltas: Sequence[LinearDelta], bias: Tensor | None, multiply: bool) -> Tensor | None:
    """The layer's bias with every record's change to it applied: scales multiply, differences add up."""
    if all(d.bias is None for d in deltas):
        return None
    if multiply:
        scales = _product([d.out_scale for d in deltas if d.bias is not None])
        return None if bias is None or scales is None else bias * scales
    own = torch.zeros(()) if bias is None else bias
    return own + sum((d.bias - own for d in deltas if d.bias is not None), torch.zeros((), device=own.device))
