"""The elementwise part of a record, around the products: it scales the input, scales the output, and adds a bias.

Scales and biases are never rounded to the dtype of what they act on (`ops.scale`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.ops.linear.layer import LinearLayer
from veneer.ops.scale import scale_columns, scale_columns_backward


def scaled_input(x: Float[Tensor, "n i"], layer: LinearLayer, *, overwrite: bool = False) -> Float[Tensor, "n i"]:
    """``in_scale * x``; x itself where no record scales it, and where x may be written over."""
    if not layer.scales_input:
        return x
    scaled = x if overwrite else torch.empty_like(x) if _reaches_all(layer, len(x)) else x.clone()
    for k, rows in layer.spans(len(x)):
        scale = layer.records[k].in_scale
        if scale is not None:
            scale_columns(x[rows], scale, None, scaled[rows])
        elif not overwrite:
            scaled[rows] = x[rows]
    return scaled


def scaled_rows(x: Float[Tensor, "n i"], layer: LinearLayer, *, copies: bool = False) -> list[Tensor | None]:
    """The rows of x in each of `LinearLayer.spans`; None where its record scales none.

    ``copies``: for who writes over x.
    """
    taken = [(layer.records[k].in_scale is not None, x[rows]) for k, rows in layer.spans(len(x))]
    return [(own.clone() if copies else own) if scales else None for scales, own in taken]


def scaled_input_backward(
    dy: Float[Tensor, "n i"], xs: Sequence[Tensor | None], layer: LinearLayer
) -> list[Tensor | None]:
    """Gradients of `scaled_input` in each record's ``in_scale``; the one in x is written into dy.

    ``xs``: the rows of x as `scaled_rows` lists them.
    """
    found: list[Tensor | None] = [None] * len(layer.records)
    for (k, rows), x in zip(layer.spans(len(dy)), xs, strict=True):
        if x is not None:
            dscale, _ = scale_columns_backward(dy[rows], x, layer.records[k].in_scale, dy[rows])
            found[k] = added(found[k], dscale)
    return found


def keeps_product(layer: LinearLayer) -> bool:
    """Return True if the backward pass needs what `finished` was given: where a scale of outputs is trained."""
    return any(r.out_scale is not None and r.out_scale.requires_grad for r in layer.records)


def finished(z: Float[Tensor, "n o"], layer: LinearLayer) -> Float[Tensor, "n o"]:
    """``out_scale * z + bias``, written into z unless the layer `keeps_product`."""
    if all(r.out_scale is None and r.bias is None for r in layer.records):
        return z if layer.bias is None else z.add_(layer.bias)
    y = torch.empty_like(z) if keeps_product(layer) else z
    for k, start, stop in layer.runs_of(len(z)).with_gaps():
        record = None if k < 0 else layer.records[k]
        scale = None if record is None else record.out_scale
        bias = layer.bias if record is None or record.bias is None else record.bias
        scale_columns(z[start:stop], scale, bias, y[start:stop])
    return y


def finished_backward(
    dy: Float[Tensor, "n o"], z: Float[Tensor, "n o"] | None, layer: LinearLayer, *, overwrite: bool = False
) -> tuple[Float[Tensor, "n o"], list[Tensor | None], list[Tensor | None]]:
    """Gradients of `finished` in z, and in each record's ``out_scale`` and ``bias``, from the z that it was given.

    ``overwrite`` writes the one in z into dy.
    """
    scales: list[Tensor | None] = [None] * len(layer.records)
    biases: list[Tensor | None] = [None] * len(layer.records)
    scaled = any(r.out_scale is not None for r in layer.records)
    in_place = overwrite or not scaled
    dz = dy if in_place else torch.empty_like(dy) if _reaches_all(layer, len(dy)) else dy.clone()
    for k, rows in layer.spans(len(dy)):
        record = layer.records[k]
        trains_bias = record.bias is not None and record.bias.requires_grad
        if record.out_scale is None:
            if not in_place:
                dz[rows] = dy[rows]
            if trains_bias:
                biases[k] = added(biases[k], scale_columns_backward(dy[rows], None, None, None, with_bias=True)[1])
            continue
        own_z = z[rows] if z is not None and record.out_scale.requires_grad else None
        dscale, dbias = scale_columns_backward(dy[rows], own_z, record.out_scale, dz[rows], with_bias=trains_bias)
        scales[k], biases[k] = added(scales[k], dscale), added(biases[k], dbias)
    return dz, scales, biases


def added(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """Their sum; None counts as zero."""
    return part if total is None else total if part is None else total + part


def _reaches_all(layer: LinearLayer, n_rows: int) -> bool:
    return n_rows == sum(stop - start for _, start, stop in layer.runs_of(n_rows).runs)
