"""Formula of `records.deltas.LinearDelta`: applied, folded and composed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veneer.errors import CompositionError
from veneer.plain.autocast import without_autocast
from veneer.records.deltas import LinearDelta
from veneer.records.frozen import FrozenWeight
from veneer.records.terms.in_order import in_order
from veneer.records.terms.scale import Scale
from veneer.records.terms.term import RowsProduct

BLOCK_VALUES = 1 << 18


def apply_linear(
    delta: LinearDelta,
    x: Float[Tensor, "*batch i"],
    weight: FrozenWeight,
    bias: Float[Tensor, " o"] | None = None,
    added_input: Float[Tensor, "*batch i"] | None = None,
) -> Float[Tensor, "*batch o"]:
    """Return the adapted layer's output, in the dtype of the base product.

    ``added_input`` replaces ``entered(delta, x)`` as the input of the added terms, for example after dropout. Terms are
    computed in the record's dtype (usually float32 on a 16-bit base), unless autocast is on. They are rounded once, at
    the end: a scale of 1.005 rounded to bfloat16 would be 1.0078.
    """
    return _apply(delta, [(delta, added_input)], x, weight, bias)


def apply_linear_sum(
    deltas: Sequence[LinearDelta],
    x: Float[Tensor, "*batch i"],
    weight: FrozenWeight,
    bias: Float[Tensor, " o"] | None,
    added_inputs: Sequence[Float[Tensor, "*batch i"] | None],
) -> Float[Tensor, "*batch o"]:
    """Return `apply_linear` of the composed records (`compose_linear`), each with its own input of the added terms.

    Raises CompositionError if they cannot act together.
    """
    return _apply(compose_linear(deltas, bias), list(zip(deltas, added_inputs, strict=True)), x, weight, bias)


def _apply(
    whole: LinearDelta,
    parts: Sequence[tuple[LinearDelta, Tensor | None]],
    x: Tensor,
    weight: FrozenWeight,
    bias: Tensor | None,
) -> Tensor:
    """Return the layer's output: the base product plus the terms of each record in ``parts``, then the output map and
    bias of ``whole``. Round once.

    The tensor beside a record, if given, is the input after dropout, which the record's terms with dropout read.
    """
    base_input = entered(whole, x)
    y = base = weight.matmul(base_input)
    for part, own_input in parts:
        source = base_input if own_input is None else own_input
        for term in part.adds:
            y = y + term.apply(source if term.takes_dropout else base_input)
    return _finished(whole, y, bias).to(base.dtype)


def apply_projected(
    whole: LinearDelta,
    products: Sequence[Float[Tensor, "*batch o"]],
    base: Float[Tensor, "*batch o"],
    bias: Float[Tensor, " o"] | None = None,
) -> Float[Tensor, "*batch o"]:
    """Return the output of `apply_linear_sum`, given its products.

    ``base`` is W x, and ``products`` are the added terms applied to their inputs. ``whole`` is `compose_linear` of the
    records. Convolutions use this, so that their input need not be unfolded into patches.
    """
    return _finished(whole, sum(products, base), bias).to(base.dtype)


def entered(delta: LinearDelta, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch i"]:
    """Return x after the record's input map, computed in the wider of both dtypes and rounded to x's."""
    if delta.input is None:
        return x
    with without_autocast(x.device):
        return delta.input.apply(x).to(x.dtype)


def _finished(whole: LinearDelta, y: Tensor, bias: Tensor | None) -> Tensor:
    """Return y after the output map of ``whole``, plus its bias or, if it has none, the layer's ``bias``."""
    if whole.output is not None:
        with without_autocast(y.device):
            y = whole.output.apply(y)
    offset = bias if whole.bias is None else whole.bias
    return y if offset is None else y + offset


def apply_embedding(
    delta: LinearDelta,
    token_ids: Int[Tensor, "*batch"],
    looked_up: Float[Tensor, "*batch o"],
    padding_idx: int | None = None,
    linear: RowsProduct = torch.nn.functional.linear,
) -> Float[Tensor, "*batch o"]:
    """Return the adapted embedding's output, given the output of the frozen table.

    Equals `apply_linear` on one-hot rows, but is computed by look-up. If a table multiplies its output (Gemma's), the
    record must be multiplied by the same number (`LinearDelta.with_adds_times`). As in torch's embedding, the column of
    a change at the token ``padding_idx`` gets no gradient. ``linear`` computes products with a factor of a term.

    Raises CompositionError if the record rotates its inputs, since each row would mix other rows.
    """
    if delta.input is not None and delta.input_scale is None:
        raise CompositionError(
            "the adapter rotates the inputs of an embedding, which are tokens: adapt linear layers with it"
        )
    y = looked_up
    for term in delta.adds:
        y = y + term.look_up(token_ids, padding_idx, linear)
    if delta.input_scale is not None:
        y = y * delta.input_scale[token_ids][..., None]
    if delta.output is not None:
        y = delta.output.apply(y)
    return (y if delta.bias is None else y + delta.bias).to(looked_up.dtype)


def fold_linear(
    delta: LinearDelta,
    weight: Float[Tensor, "*experts o i"],
    bias: Float[Tensor, " o"] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Float[Tensor, "*experts o i"], Float[Tensor, " o"] | None]:
    """Return ``output (W + Σ adds) input`` and the bias, in ``dtype``, or in W's dtype if it is None.

    Computed in at least float32; without autograd, by blocks of rows. Pairs and scales then need no temporary matrix as
    large as W. Other changes are materialized whole, and a rotation of outputs needs all rows at once.
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
    """Yield the weight of `fold_linear` block by block, from consecutive blocks of rows (of stacked weights: experts).

    Blocks are not kept, unless outputs are rotated.
    """
    if delta.output is not None and delta.output_scale is None:
        blocks = list(weight)
        yield from torch.split(_fold(delta, torch.cat(blocks)).to(dtype), [len(block) for block in blocks])
        return
    first, made = 0, list[Tensor]()
    for block in weight:
        rows = slice(first, first + len(block))
        wide = torch.promote_types(block.dtype, torch.float32)
        made = made or [change.dense(wide) for change in delta.changes]
        yield _fold(_of_rows(delta, rows), block, [change[rows] for change in made]).to(dtype)
        first = rows.stop


def row_blocks(weight: Float[Tensor, "n *rest"]) -> list[slice]:
    """Return slices of the rows of a weight (of stacked weights: the experts), of about `BLOCK_VALUES` values each."""
    n_rows = max(1, BLOCK_VALUES // max(1, weight[0].numel()))
    return [slice(start, start + n_rows) for start in range(0, weight.shape[0], n_rows)]


def _fold(delta: LinearDelta, weight: Tensor, made: Sequence[Tensor] = ()) -> Tensor:
    """Return the weight with a record folded into it, in at least float32. ``made`` are further changes, as matrices to
    add.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    folded = weight.to(wide)
    for term in delta.adds:
        folded = folded + term.dense(wide)
    for matrix in made:
        folded = folded + matrix
    if delta.input is not None:
        folded = delta.input.fold_input(folded)
    return folded if delta.output is None else delta.output.fold_output(folded)


def _of_rows(delta: LinearDelta, rows: slice) -> LinearDelta:
    """Return a record's pair, input map and output scale, reduced to some rows of the weight or, for a stack, to some
    experts.
    """
    pair, output = delta.low_rank, delta.output
    return LinearDelta(
        adds=() if pair is None else (pair.of_rows(rows),),
        input=delta.input,
        output=output.of_rows(rows) if isinstance(output, Scale) else None,
    )


def compose_linear(deltas: Sequence[LinearDelta], bias: Float[Tensor, " o"] | None = None) -> LinearDelta:
    """Return one record equivalent to all records together, on a layer with this bias.

    Records that only add to the weight are summed; pairs are concatenated along the rank, which is exact. Records that
    only scale and rotate are applied in order, each to the layer adapted by the records before it: the last record's
    input map comes first. The two kinds cannot be combined.

    Raises CompositionError if records of both kinds are given, or a record that does both.
    """
    if len(deltas) == 1:
        return deltas[0]
    around = [d for d in deltas if not d.only_adds]
    if around and any(d.adds or (d.bias is not None and d.output is None) for d in deltas):
        raise CompositionError(
            f"{len(deltas)} adapters are active on one layer and {len(around)} of them scale or rotate its inputs or "
            "outputs (DoRA, IA3, OFT); such an update has no sum with one that adds to the layer. Activate one of them "
            "at a time, merge one first, or combine them with add_weighted_adapter."
        )
    return LinearDelta(
        adds=tuple(term for d in deltas for term in d.adds),
        input=in_order([d.input for d in reversed(deltas) if d.input is not None]),
        output=in_order([d.output for d in deltas if d.output is not None]),
        bias=_mapped_bias(deltas, bias) if around else _sum_of_biases(deltas, bias),
    )


def _mapped_bias(deltas: Sequence[LinearDelta], bias: Tensor | None) -> Tensor | None:
    """Return the layer's bias after the output maps of the records that have both such a map and a bias.

    Return None if the layer has no bias, or no record has both.
    """
    maps = [d.output for d in deltas if d.bias is not None and d.output is not None]
    if bias is None or not maps:
        return None
    for each in maps:
        bias = each.apply(bias)
    return bias


def _sum_of_biases(deltas: Sequence[LinearDelta], bias: Tensor | None) -> Tensor | None:
    """Return the layer's bias plus each record's change to it; None if no record has a bias."""
    if all(d.bias is None for d in deltas):
        return None
    own = torch.zeros(()) if bias is None else bias
    return own + sum((d.bias - own for d in deltas if d.bias is not None), torch.zeros((), device=own.device))
