"""Frozen linear layers with the records of adapters on them, forward and backward.

``y = output(W x' + scale * b_scale * B (core * A drop(x')) + Σ ΔW drop(x')) + bias`` with ``x' = input(x)``.

`records.linear` is the specification of these kernels. Layers that read the same x (q, k, v; gate and up) go through
one call: their A's are joined, so x is read once. The backward pass keeps x and the ``A x`` of all of them. It also
keeps the product in front of a trained map of outputs, since recomputing it would cost the layer's largest product
again. Masks, mapped inputs and changes of the weight are recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.ops.linear.around import (
    finished,
    finished_backward,
    keeps_product,
    mapped_input,
    mapped_input_backward,
    mapped_rows,
)
from veneer.ops.linear.change import Gradients, add_changes, changes_backward
from veneer.ops.linear.layer import LinearLayer, require_fit, tensors_of
from veneer.ops.linear.low_rank import (
    FactorGradients,
    add_low_rank,
    factor_gradients,
    input_gradients,
    low_rank_backward,
)
from veneer.ops.linear.weight import add_transposed, product
from veneer.ops.matmul import operand
from veneer.records.deltas import LinearDelta
from veneer.records.terms.pair import Pair
from veneer.records.terms.term import field_names

WHOLE = -1
"""In place of a layer: the x that layers share."""


@dataclass(frozen=True, slots=True)
class SavedForBackward:
    """Tensors that `backward` reads besides x: the products with A, and each layer's product if its output map is
    trained.
    """

    us: tuple[Tensor, ...]
    products: tuple[Tensor | None, ...]

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All kept tensors as one tuple, for autograd to save."""
        return (*self.us, *self.products)

    def without_products(self) -> SavedForBackward:
        """Return a copy without the products, which are then recomputed."""
        return SavedForBackward(self.us, (None,) * len(self.products))

    @classmethod
    def of(cls, tensors: Sequence[Tensor | None], layers: Sequence[LinearLayer]) -> SavedForBackward:
        """Rebuild the object from its `tensors`, for the same layers."""
        n_us = len(tensors) - len(layers)
        return cls(tuple(cast("Sequence[Tensor]", tensors[:n_us])), tuple(tensors[n_us:]))


@dataclass(frozen=True, slots=True)
class LinearGradients:
    """Gradients of `forward`: in x, if requested, and in the records' tensors as `tensors_of` lists them."""

    x: Tensor | None
    records: tuple[Tensor | None, ...]


def linear(x: Float[Tensor, "*batch i"], layer: LinearLayer) -> Float[Tensor, "*batch o"]:
    """Return the output of one layer under autograd: gradients flow to x and to every tensor of its records."""
    return linears(x, [layer])[0]


def linears(x: Float[Tensor, "*batch i"], layers: Sequence[LinearLayer]) -> tuple[Float[Tensor, "*batch _"], ...]:
    """Return the outputs of layers that share their input, under autograd.

    Raises ShapeError if a layer does not fit x.
    """
    require_fit(x, layers)
    ys: tuple[Tensor, ...] = _Linears.apply(  # type: ignore[no-untyped-call]
        x.reshape(-1, x.shape[-1]), tuple(layers), *tensors_of(layers)
    )
    return tuple(y.reshape(*x.shape[:-1], -1) for y in ys)


def forward(
    x: Float[Tensor, "n i"], layers: Sequence[LinearLayer], *, owns_x: bool = False
) -> tuple[tuple[Float[Tensor, "n _"], ...], SavedForBackward]:
    """Return the outputs, and the tensors that `backward` reads.

    ``owns_x`` allows x to be overwritten: if there is one layer and its adapter maps the input, x is mapped in place,
    without a copy.
    """
    alone = owns_x and len(layers) == 1
    inputs = [mapped_input(x, layer, overwrite=alone) for layer in layers]
    read_by_adds = [own if layer.adds_to_mapped else x for own, layer in zip(inputs, layers, strict=True)]
    by_pairs = [own for own, layer in zip(read_by_adds, layers, strict=True) if layer.is_lowrank]
    reads = _operands([*inputs, *by_pairs])
    zs = [product(own, reads[id(own)], layer.weight) for own, layer in zip(inputs, layers, strict=True)]
    us = tuple(
        add_low_rank(
            read_by_adds[places[0]],
            reads[id(read_by_adds[places[0]])],
            [zs[i] for i in places],
            [layers[i] for i in places],
        )
        for places in _together(layers)
    )
    for z, own, layer in zip(zs, read_by_adds, layers, strict=True):
        if layer.has_changes:
            add_changes(z, own, layer)
    kept = SavedForBackward(us, tuple(z if keeps_product(layer) else None for z, layer in zip(zs, layers, strict=True)))
    return tuple(finished(z, layer) for z, layer in zip(zs, layers, strict=True)), kept


def outputs(
    kept_ys: Sequence[Tensor | None], kept: SavedForBackward, layers: Sequence[LinearLayer]
) -> tuple[Float[Tensor, "n _"], ...]:
    """Return every layer's output: the kept one; or, if only its product was kept, the output computed from the
    product.
    """
    return tuple(
        cast(Tensor, y) if z is None else finished(z, layer)
        for y, z, layer in zip(kept_ys, kept.products, layers, strict=True)
    )


def backward(
    dys: Sequence[Float[Tensor, "n _"]],
    x: Float[Tensor, "n i"],
    kept: SavedForBackward,
    layers: Sequence[LinearLayer],
    *,
    input_grad: bool = True,
    overwrite: bool = False,
    owns_x: bool = False,
) -> LinearGradients:
    """Return the gradients of `forward`, given the gradients in the outputs, x, and the tensors kept by `forward`.

    ``overwrite`` allows the gradients in the outputs to be overwritten, and ``owns_x`` x. If an adapter maps the input
    and also adds to the weight, x is mapped again. If this overwrites x, its rows are copied first for the gradient of
    the map.
    """
    alone = owns_x and len(layers) == 1 and layers[0].adds_to_mapped
    found = _Found(layers)
    dzs = [found.finish(place, dy, z, overwrite) for place, (dy, z) in enumerate(zip(dys, kept.products, strict=True))]
    reads = [operand(dz) for dz in dzs]
    mapped = {place: mapped_rows(x, layer, copies=alone) for place, layer in enumerate(layers) if layer.maps_input}
    inputs = [mapped_input(x, layer, overwrite=alone) if layer.adds_to_mapped else x for layer in layers]
    into = [place if layer.maps_input else WHOLE for place, layer in enumerate(layers)]
    totals: dict[int, Tensor | None] = {}
    for places, u in zip(_together(layers), kept.us, strict=True):
        first = places[0]
        to = into[first] if layers[first].adds_to_mapped else WHOLE
        own = [(dzs[i], reads[i]) for i in places]
        got = low_rank_backward(own, inputs[first], u, [layers[i] for i in places], input_grad or to != WHOLE)
        found.add_factors(places, got.factors)
        if got.x is not None:
            totals[to] = _summed(totals.get(to), got.x)
    for place, (layer, dz, read) in enumerate(zip(layers, dzs, reads, strict=True)):
        wanted = input_grad or into[place] != WHOLE
        dx = totals.get(into[place])
        if layer.has_changes:
            totals[into[place]], changes = changes_backward(dz, read, inputs[place], layer, dx, wanted)
            found.add(place, changes=changes)
        elif wanted:
            totals[into[place]] = add_transposed(dx, dz, read, layer.weight)
    for place, rows in mapped.items():
        dx = cast(Tensor, totals[place])
        found.add(place, input=mapped_input_backward(dx, rows, layers[place]))
        if input_grad:
            totals[WHOLE] = _summed(totals.get(WHOLE), dx)
    return LinearGradients(totals.get(WHOLE), found.listed())


def takes_input_late(layer: LinearLayer) -> bool:
    """Return True if `backward_before_input` applies to the layer.

    At most one record may act on all rows, without a map of the input, and with no change of the weight but a low-rank
    pair.
    """
    return not layer.maps_input and not layer.goes_by_rows and not layer.has_changes


def backward_before_input(
    dy: Float[Tensor, "n o"],
    kept: SavedForBackward,
    layer: LinearLayer,
    make_input: Callable[[Float[Tensor, "n i"]], Float[Tensor, "n i"]],
) -> tuple[Tensor | None, ...]:
    """Return the gradients with respect to the tensors of one layer's records, if the layer's input x was not kept.

    ``make_input`` is called with the gradient with respect to x, which it may write over, and returns x. It is called
    so because the function that propagates this gradient often recomputes x too.
    """
    found = _Found([layer])
    dz = found.finish(0, dy, kept.products[0], False)
    own, layers = [(dz, operand(dz))], [layer]
    du, dx = input_gradients(own, kept.us[0], layers, True) if layer.is_lowrank else (None, None)
    x = make_input(add_transposed(dx, *own[0], layer.weight))
    del dx
    if du is not None:
        found.add_factors([0], factor_gradients(own, du, x, kept.us[0], layers))
    return found.listed()


@dataclass(slots=True)
class _OfRecord:
    """Gradients with respect to the tensors of one record: its pair, its changes of the weight, its maps of input and
    output, its bias.
    """

    record: LinearDelta
    pair: FactorGradients = field(default_factory=dict)
    changes: Sequence[Gradients] = ()
    input: Gradients = ()
    output: Gradients = ()
    bias: Tensor | None = None

    def listed(self) -> Iterator[Tensor | None]:
        """Yield the gradients in the order of the record's tensors; None for a tensor without a gradient."""
        pair, record = self.record.low_rank, self.record
        if pair is not None:
            yield from (self.pair.get(name) for name in field_names(Pair) if isinstance(getattr(pair, name), Tensor))
        for place, change in enumerate(record.changes):
            yield from (self.changes[place] if self.changes else ()) or (None,) * len(change.tensors)
        for term, own in ((record.input, self.input), (record.output, self.output)):
            if term is not None:
                yield from own or (None,) * len(term.tensors)
        if record.bias is not None:
            yield self.bias


class _Found:
    """Collector of the gradients in the records' tensors."""

    def __init__(self, layers: Sequence[LinearLayer]) -> None:
        self.layers = layers
        self.values = [[_OfRecord(record) for record in layer.records] for layer in layers]

    def add(self, place: int, **terms: Sequence[Any]) -> None:
        """Add the gradients of the layer with index ``place``, for each term as a sequence over the records."""
        for term, gradients in terms.items():
            for values, gradient in zip(self.values[place], gradients, strict=True):
                setattr(values, term, gradient)

    def finish(self, place: int, dy: Tensor, z: Tensor | None, overwrite: bool) -> Tensor:
        """Return the gradient with respect to a layer's product, and keep the gradients of its records' output maps and
        biases.
        """
        dz, maps, biases = finished_backward(dy, z, self.layers[place], overwrite=overwrite)
        self.add(place, output=maps, bias=biases)
        return dz

    def add_factors(self, places: Sequence[int], factors: Sequence[Sequence[FactorGradients]]) -> None:
        """Add the low-rank pairs' gradients of some layers (``places``), each with one entry for every record."""
        for place, gradients in zip(places, factors, strict=True):
            self.add(place, pair=gradients)

    def listed(self) -> tuple[Tensor | None, ...]:
        """Return the gradients in the order in which `tensors_of` lists the tensors; None for a tensor without a
        gradient.
        """
        return tuple(gradient for layer in self.values for values in layer for gradient in values.listed())


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: tuple[LinearLayer, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        ys, kept = forward(x, layers)
        ctx.save_for_backward(x, *kept.tensors)
        ctx.layers = layers
        return ys

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        kept = SavedForBackward.of(tensors, ctx.layers)
        found = backward(dys, x, kept, ctx.layers, input_grad=ctx.needs_input_grad[0])
        return found.x, None, *found.records


def _together(layers: Sequence[LinearLayer]) -> list[list[int]]:
    """Return the layers' indices in groups, each of which has its low-rank parts computed in one call.

    A layer whose pairs read a scaled or rotated input is a group of its own.
    """
    adapted = [i for i, layer in enumerate(layers) if layer.is_lowrank]
    sharing = [i for i in adapted if not layers[i].adds_to_mapped]
    groups = [[i for i in sharing if layers[i].goes_by_rows == by_rows] for by_rows in (False, True)]
    return [group for group in groups if group] + [[i] for i in adapted if layers[i].adds_to_mapped]


def _summed(total: Tensor | None, part: Tensor) -> Tensor:
    """Add ``part`` to ``total`` in place, and return ``total``; return ``part`` if ``total`` is None. No other code may
    need the old ``total``.
    """
    return part if total is None else total.add_(part)


def _operands(inputs: Sequence[Tensor]) -> dict[int, Tensor]:
    """Return the `operand` of each distinct input, by the input's id: each is widened once for all layers."""
    distinct = {id(x): x for x in inputs}
    return {key: operand(x) for key, x in distinct.items()}
