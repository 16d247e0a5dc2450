"""The elementwise part of a record, around the products: it scales the input, scales the output, and adds a bias.

Scales and biases are never rounded to the dtype of what they act on: each result is computed in the wider of the two
and rounded once. In 16 bits that goes some rows at a time, so that no wide copy is as large as the activations.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.ops.linear.layer import LinearLayer

BLOCK_VALUES = 1 << 16
"""Values that are held in a wide copy at once."""


def scaled_input(x: Float[Tensor, "n i"], layer: LinearLayer) -> Float[Tensor, "n i"]:
    """``in_scale * x``; x itself where no record scales it."""
    if not layer.scales_input:
        return x
    scaled = torch.empty_like(x) if _reaches_all(layer, len(x)) else x.clone()
    for k, rows in layer.spans(len(x)):
        scale = layer.records[k].in_scale
        if scale is None:
            scaled[rows] = x[rows]
        else:
            _scale(x[rows], scale, None, scaled[rows])
    return scaled


def scaled_input_backward(
    dy: Float[Tensor, "n i"], x: Float[Tensor, "n i"], layer: LinearLayer
) -> tuple[Float[Tensor, "n i"], list[Tensor | None]]:
    """Gradients of `scaled_input` in x and in each record's ``in_scale``."""
    found: list[Tensor | None] = [None] * len(layer.records)
    dx = torch.empty_like(dy) if _reaches_all(layer, len(x)) else dy.clone()
    for k, rows in layer.spans(len(x)):
        scale = layer.records[k].in_scale
        if scale is None:
            dx[rows] = dy[rows]
        else:
            dscale, _ = _scale_backward(dy[rows], x[rows], scale, dx[rows])
            found[k] = added(found[k], dscale)
    return dx, found


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
        _scale(z[start:stop], scale, bias, y[start:stop])
    return y


def finished_backward(
    dy: Float[Tensor, "n o"], z: Float[Tensor, "n o"] | None, layer: LinearLayer
) -> tuple[Float[Tensor, "n o"], list[Tensor | None], list[Tensor | None]]:
    """Gradients of `finished` in z, and in each record's ``out_scale`` and ``bias``, from the z that it was given."""
    scales: list[Tensor | None] = [None] * len(layer.records)
    biases: list[Tensor | None] = [None] * len(layer.records)
    scaled = any(r.out_scale is not None for r in layer.records)
    dz = dy if not scaled else torch.empty_like(dy) if _reaches_all(layer, len(dy)) else dy.clone()
    for k, rows in layer.spans(len(dy)):
        record = layer.records[k]
        trains_bias = record.bias is not None and record.bias.requires_grad
        if record.out_scale is None:
            if scaled:
                dz[rows] = dy[rows]
            if trains_bias:
                biases[k] = added(biases[k], _sum(dy[rows]))
            continue
        own_z = z[rows] if z is not None and record.out_scale.requires_grad else None
        dscale, dbias = _scale_backward(dy[rows], own_z, record.out_scale, dz[rows], trains_bias)
        scales[k], biases[k] = added(scales[k], dscale), added(biases[k], dbias)
    return dz, scales, biases


def added(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """Their sum; None counts as zero."""
    return part if total is None else total if part is None else total + part


def _reaches_all(layer: LinearLayer, n_rows: int) -> bool:
    return n_rows == sum(stop - start for _, start, stop in layer.runs_of(n_rows).runs)


def _scale(z: Tensor, scale: Tensor | None, bias: Tensor | None, y: Tensor) -> None:
    """``y = scale * z + bias``."""
    for own_z, own_y in _blocks(z, y, wide=_widens(z, scale, bias)):
        if scale is None:
            own_y.copy_(own_z if bias is None else own_z + bias)
        elif own_z.dtype != scale.dtype:
            product = own_z * scale
            own_y.copy_(product if bias is None else product.add_(bias))
        else:
            torch.mul(own_z, scale, out=own_y)
            if bias is not None:
                own_y.add_(bias)


def _scale_backward(
    dy: Tensor, z: Tensor | None, scale: Tensor, dz: Tensor, with_bias: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `_scale`: that in z is written into dz, those in scale (where there is a z) and bias come back."""
    dscale: Tensor | None = None
    dbias: Tensor | None = None
    given = (dy, dz) if z is None else (dy, dz, z)
    for own_dy, own_dz, *own_z in _blocks(*given, wide=_widens(dy, scale, None)):
        wide = own_dy.to(scale.dtype)
        if own_z:
            dscale = added(dscale, (wide * own_z[0]).sum(dim=0))
        if with_bias:
            dbias = added(dbias, wide.sum(dim=0))
        if wide is own_dy:
            torch.mul(wide, scale, out=own_dz)
        else:
            own_dz.copy_(wide.mul_(scale))
    return dscale, dbias


def _sum(dy: Tensor) -> Tensor:
    return dy.sum(dim=0, dtype=torch.promote_types(dy.dtype, torch.float32))


def _widens(z: Tensor, *others: Tensor | None) -> bool:
    return not all(t is None or t.dtype == z.dtype for t in others)


def _blocks(*tensors: Tensor, wide: bool) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each, all at once or some at a time."""
    n_rows = max(1, BLOCK_VALUES // max(1, tensors[0].shape[1])) if wide else max(1, len(tensors[0]))
    return zip(*(torch.split(t, n_rows) for t in tensors), strict=True)
