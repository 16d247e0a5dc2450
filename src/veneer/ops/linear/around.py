"""Terms before and after a layer's product: a map of the input, a map of the output, and a bias.

Scales and biases are never rounded to the dtype of the tensor that they act on (`ops.scale`). Block-diagonal rotations
are not rounded if a kernel applies them (`ops.linear.forms`). For other ones, the difference from the identity is
rounded (`ops.linear.blocks`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.ops.linear.blocks import blocks_gradient, less_identity, turn
from veneer.ops.linear.change import (
    Gradients,
    added,
    added_up,
    form_of,
    gradients_by_form,
    gradients_in,
    leaves_of,
    with_leaves,
)
from veneer.ops.linear.forms import form_gradients, map_rows
from veneer.ops.linear.layer import LinearLayer
from veneer.ops.scale import scale_columns, scale_columns_backward
from veneer.records.deltas import Around
from veneer.records.terms.rotation import Rotation


def mapped_input(x: Float[Tensor, "n i"], layer: LinearLayer, *, overwrite: bool = False) -> Float[Tensor, "n i"]:
    """Return the input that the weight reads; x itself if no record maps it. ``overwrite`` lets x be written over."""
    if not layer.maps_input:
        return x
    mapped = x if overwrite else torch.empty_like(x) if _reaches_all(layer, len(x)) else x.clone()
    for k, rows in layer.spans(len(x)):
        term = layer.records[k].input
        if term is not None:
            _map(x[rows], term, None, mapped[rows], layer)
        elif not overwrite:
            mapped[rows] = x[rows]
    return mapped


def mapped_rows(x: Float[Tensor, "n i"], layer: LinearLayer, *, copies: bool = False) -> list[Tensor | None]:
    """Return the rows of x in each of `LinearLayer.spans`, or None if the span's record does not map them.

    ``copies``: return copies, for a caller that writes over x.
    """
    taken = [(layer.records[k].input is not None, x[rows]) for k, rows in layer.spans(len(x))]
    return [(own.clone() if copies else own) if maps else None for maps, own in taken]


def mapped_input_backward(dy: Float[Tensor, "n i"], xs: Sequence[Tensor | None], layer: LinearLayer) -> list[Gradients]:
    """Return the gradients of `mapped_input` with respect to the tensors of each record's map. Write the gradient with
    respect to x into dy.

    ``xs``: the rows of x as `mapped_rows` lists them.
    """
    found: list[Gradients] = [()] * len(layer.records)
    for (k, rows), x in zip(layer.spans(len(dy)), xs, strict=True):
        term = layer.records[k].input
        if x is not None and term is not None:
            gradients, _ = _map_backward(dy[rows], x, term, dy[rows], layer)
            found[k] = added_up(found[k], gradients)
    return found


def keeps_product(layer: LinearLayer) -> bool:
    """Return True if the backward pass needs the input of `finished`, since a map of outputs is trained."""
    return any(r.output is not None and r.output.is_trained for r in layer.records)


def finished(z: Float[Tensor, "n o"], layer: LinearLayer) -> Float[Tensor, "n o"]:
    """Return ``output(z) + bias``, written into z unless the layer `keeps_product`."""
    if all(r.output is None and r.bias is None for r in layer.records):
        return z if layer.bias is None else z.add_(layer.bias)
    y = torch.empty_like(z) if keeps_product(layer) else z
    for k, start, stop in layer.runs_of(len(z)).with_gaps():
        record = None if k < 0 else layer.records[k]
        bias = layer.bias if record is None or record.bias is None else record.bias
        _map(z[start:stop], None if record is None else record.output, bias, y[start:stop], layer)
    return y


def finished_backward(
    dy: Float[Tensor, "n o"], z: Float[Tensor, "n o"] | None, layer: LinearLayer, *, overwrite: bool = False
) -> tuple[Float[Tensor, "n o"], list[Gradients], list[Tensor | None]]:
    """Return the gradients of `finished` with respect to z, to the tensors of each record's ``output``, and to its
    ``bias``.

    ``z`` is the input that `finished` was given. ``overwrite`` writes the gradient with respect to z into dy.
    """
    maps: list[Gradients] = [()] * len(layer.records)
    biases: list[Tensor | None] = [None] * len(layer.records)
    in_place = overwrite or all(r.output is None for r in layer.records)
    dz = dy if in_place else torch.empty_like(dy) if _reaches_all(layer, len(dy)) else dy.clone()
    for k, rows in layer.spans(len(dy)):
        term, bias = layer.records[k].output, layer.records[k].bias
        trains_bias = bias is not None and bias.requires_grad
        if term is None:
            if not in_place:
                dz[rows] = dy[rows]
            if trains_bias:
                biases[k] = added(biases[k], scale_columns_backward(dy[rows], None, None, None, with_bias=True)[1])
            continue
        own_z = z[rows] if z is not None and term.is_trained else None
        gradients, dbias = _map_backward(dy[rows], own_z, term, dz[rows], layer, with_bias=trains_bias)
        maps[k], biases[k] = added_up(maps[k], gradients), added(biases[k], dbias)
    return dz, maps, biases


def _map(z: Tensor, term: Around | None, bias: Tensor | None, out: Tensor, layer: LinearLayer) -> None:
    """Write ``term(z) + bias`` to ``out``, which may be z."""
    if not isinstance(term, Rotation):
        scale_columns(z, None if term is None else term.vector, bias, out)
        return
    form = form_of(term, z, layer)
    less = less_identity(term, z.dtype) if form is None and layer.is_batch(len(z)) else None
    if form is not None:
        map_rows(form, z, out, add=False)
    elif less is not None:
        turn(z, less, out)
    else:
        own = term.apply(z)
        out.copy_(own if bias is None else own + bias)
        return
    if bias is not None:
        out.add_(bias)


def _map_backward(
    dy: Tensor, z: Tensor | None, term: Around, dz: Tensor, layer: LinearLayer, *, with_bias: bool = False
) -> tuple[Gradients, Tensor | None]:
    """Return the gradients of `_map` with respect to the term's tensors (None without z), and to the bias (None unless
    ``with_bias``).

    The gradient with respect to z is written to ``dz``.
    """
    if not isinstance(term, Rotation):
        dscale, dbias = scale_columns_backward(dy, z, term.vector, dz, with_bias=with_bias)
        return (dscale,), dbias
    dbias = scale_columns_backward(dy, None, None, None, with_bias=True)[1] if with_bias else None
    return _turn_backward(dy, z, term, dz, layer), dbias


def _turn_backward(dy: Tensor, z: Tensor | None, term: Rotation, dz: Tensor, layer: LinearLayer) -> Gradients:
    if form_of(term, dy, layer) is not None:
        leaves, form = with_leaves(term)
        found: Gradients = (None,) * len(leaves)
        if z is not None:
            found = gradients_by_form(leaves, form, lambda form: form_gradients(form, dy, z))
        map_rows(form, dy, dz, add=False, transposed=True)
        return found
    leaves = leaves_of(term)
    with torch.enable_grad():
        own = term.with_tensors(leaves)
        less = less_identity(own, dy.dtype) if layer.is_batch(len(dy)) else None
        made = own.apply(z) if less is None and z is not None else less
    gradients: Gradients = (None,) * len(leaves)
    if z is not None and made is not None:
        gradients = gradients_in(leaves, made, dy.to(made.dtype) if less is None else blocks_gradient(dy, z, less))
    if less is None:
        dz.copy_(term.transposed().apply(dy))
    else:
        turn(dy, less.detach().mT, dz)
    return gradients


def _reaches_all(layer: LinearLayer, n_rows: int) -> bool:
    return n_rows == sum(stop - start for _, start, stop in layer.runs_of(n_rows).runs)
