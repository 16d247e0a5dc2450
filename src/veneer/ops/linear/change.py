"""Changes of the weight other than a low-rank pair: their products added to outputs, and the backward pass.

The backward pass computes a change again under autograd, so neither its matrix nor intermediate results are kept.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.core.terms.change import Change
from veneer.core.terms.rotation import Rotation
from veneer.ops.linear.layer import LinearLayer

Gradients = tuple[Tensor | None, ...]
"""In the tensors of a term, in their order."""


def add_changes(z: Float[Tensor, "n o"], x: Float[Tensor, "n i"], layer: LinearLayer) -> None:
    """Add ``ΔW x`` of each record's changes to the rows that take it, in place."""
    for k, rows in layer.spans(len(x)):
        for change in layer.records[k].changes:
            z[rows].add_(change.on(rows).apply(x[rows]))


def changes_backward(
    dz: Float[Tensor, "n o"], x: Float[Tensor, "n i"], layer: LinearLayer, input_grad: bool
) -> tuple[Tensor | None, list[list[Gradients]]]:
    """Return the gradients of `add_changes` in x (None if not asked for), and in the tensors of each
    record's changes.
    """
    dx = torch.zeros_like(x) if input_grad else None
    found: list[list[Gradients]] = [[()] * len(record.changes) for record in layer.records]
    for k, rows in layer.spans(len(x)):
        for place, change in enumerate(layer.records[k].changes):
            own, gradients = term_backward(change.on(rows), dz[rows], x[rows], input_grad)
            found[k][place] = added_up(found[k][place], gradients)
            if dx is not None and own is not None:
                dx[rows].add_(own)
    return dx, found


def term_backward(
    term: Change | Rotation, dy: Float[Tensor, "n o"], x: Float[Tensor, "n i"], input_grad: bool
) -> tuple[Tensor | None, Gradients]:
    """Return the gradients of ``term.apply(x)`` in x (None if not asked for) and in the term's tensors, by
    recomputation.
    """
    with torch.enable_grad():
        tensors = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in term.tensors]
        x = x.detach().requires_grad_(input_grad)
        y = term.with_tensors(tensors).apply(x)
    wanted = [tensor for tensor in (x, *tensors) if tensor.requires_grad]
    if not wanted:
        return None, (None,) * len(tensors)
    found = iter(torch.autograd.grad(y, wanted, dy.to(y.dtype), allow_unused=True))
    dx, *gradients = (next(found) if tensor.requires_grad else None for tensor in (x, *tensors))
    return dx, tuple(gradients)


def added_up(totals: Gradients, parts: Gradients) -> Gradients:
    """Return the elementwise sums of two lists of gradients; the parts alone if totals is empty."""
    return tuple(added(*both) for both in zip(totals, parts, strict=True)) if totals else parts


def added(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """Return the sum of two gradients; None counts as zero."""
    return part if total is None else total if part is None else total + part
