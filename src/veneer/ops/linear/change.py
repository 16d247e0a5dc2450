"""Changes of a weight that are no low-rank pairs: their products, added to outputs, and the backward pass.

In a batch (`LinearLayer.is_batch`), a change whose form has a kernel is applied in float32 (`forms`). The tensors of
other changes are rounded to x's dtype for the products, as low-rank pairs are. If `Change.is_made_for` the rows, the
change is computed as one matrix, and again in the backward pass; by a kernel if it multiplies the frozen weight. The
backward pass of a `LowRankMixture` recomputes the values between A and B; that of other changes recomputes the product
under autograd. So neither a matrix nor intermediate results are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.ops.dispatch import kernel_isa
from veneer.ops.dropout import Mask
from veneer.ops.linear.forms import entries, entry_gradients, form_gradients, has_entries, has_kernel, map_rows
from veneer.ops.linear.layer import LinearLayer
from veneer.ops.linear.weight import add_transposed
from veneer.ops.matmul import add_matmul, float32_is_faster, matmul
from veneer.ops.traced import traced_isa
from veneer.records.terms.change import Change, Weighed
from veneer.records.terms.form import Form
from veneer.records.terms.mixture import LowRankMixture
from veneer.records.terms.term import Term

Gradients = tuple[Tensor | None, ...]
"""In the tensors of a term, in their order."""


def add_changes(z: Float[Tensor, "n o"], x: Float[Tensor, "n i"], layer: LinearLayer) -> None:
    """Add ``ΔW x`` of each record's changes to z in place, in the rows on which the record acts."""
    for k, rows, n_before in _spans(layer, len(x)):
        for change in layer.records[k].changes:
            mask = _mask_of(change, layer, k)
            own, own_x = _kept(change.on(rows, n_before), mask), _dropped(x, mask, rows)
            form = form_of(own, own_x, layer)
            if form is not None:
                map_rows(form, own_x, z[rows], add=True)
            elif _is_made(own, own_x, layer):
                add_matmul(z[rows], own_x, _matrix(own, x.dtype)[0].T)
            elif isinstance(own, LowRankMixture) and layer.is_batch(len(own_x)):
                add_matmul(z[rows], *own.outward(matmul(own_x, own.a.to(x.dtype).T, x.dtype)))
            else:
                z[rows].add_(_rounded(own, own_x, layer).apply(own_x))


def changes_backward(
    dz: Float[Tensor, "n o"],
    read: Float[Tensor, "n o"],
    x: Float[Tensor, "n i"],
    layer: LinearLayer,
    dx: Float[Tensor, "n i"] | None,
    input_grad: bool,
) -> tuple[Float[Tensor, "n i"] | None, list[list[Gradients]]]:
    """Return ``dx``, and the gradients with respect to the tensors of each record's changes.

    If ``input_grad``, the gradients with respect to x of both ``W x`` and `add_changes` are added to ``dx``. ``read``
    is dz as `ops.matmul.operand` returns it.
    """
    alone, weight = None if layer.masks else _only_change(layer), layer.weight
    if alone is not None and isinstance(weight, Tensor) and _is_made(alone, x, layer):
        made = _Made.of(alone, x.dtype)
        if input_grad:  # in one product: to round the sum moves this gradient no further than its own rounding does
            dx = add_transposed(dx, dz, read, weight + made.matrix.detach())
        return dx, [[made.gradients(dz, x)]]
    if input_grad:
        dx = add_transposed(dx, dz, read, layer.weight)
    found: list[list[Gradients]] = [[()] * len(record.changes) for record in layer.records]
    for k, rows, n_before in _spans(layer, len(x)):
        own_dx = None if dx is None or not input_grad else dx[rows]
        for place, change in enumerate(layer.records[k].changes):
            mask = _mask_of(change, layer, k)
            own, own_x = _kept(change.on(rows, n_before), mask), _dropped(x, mask, rows)
            into = own_dx if mask is None or own_dx is None else torch.zeros_like(own_dx)
            given = dz[rows], own_x, into
            if form_of(own, own_x, layer) is not None:
                gradients = _form_backward(own, *given)
            elif _is_made(own, own_x, layer):
                gradients = _made_backward(own, *given)
            elif isinstance(own, LowRankMixture) and layer.is_batch(len(own_x)):
                gradients = _mixture_backward(own, *given)
            else:
                gradients = _product_backward(own, *given, layer)
            found[k][place] = added_up(found[k][place], gradients)
            if mask is not None and own_dx is not None and into is not None:
                own_dx.add_(mask.drop(into, rows))
    return dx, found


def _spans(layer: LinearLayer, n_rows: int) -> Iterator[tuple[int, slice, int]]:
    """Yield the runs of `LinearLayer.spans`, each with the number of earlier rows that use its record."""
    n_before = [0] * len(layer.records)
    for k, rows in layer.spans(n_rows):
        yield k, rows, n_before[k]
        n_before[k] += rows.stop - rows.start


def _mask_of(change: Change, layer: LinearLayer, k: int) -> Mask | None:
    """Return the dropout mask of record k; None if this kind of change does not apply dropout to its input."""
    return layer.mask_of(k) if change.takes_dropout else None


def _dropped(x: Tensor, mask: Mask | None, rows: slice) -> Tensor:
    """Apply a dropout mask to rows of x, without scaling the kept values."""
    return x[rows] if mask is None else mask.drop(x[rows], rows)


def _kept(change: Change, mask: Mask | None) -> Change:
    """Return the change, multiplied by the mask's scale of kept inputs. The change is scaled and not x, because x in 16
    bits would be rounded.
    """
    return change if mask is None else Weighed(of=change, weight=mask.scale)


def _only_change(layer: LinearLayer) -> Change | None:
    """Return the layer's change of the weight, other than a low-rank pair, if there is exactly one and it acts on all
    rows; else None.
    """
    changes = layer.record.changes if layer.runs is None else ()
    return changes[0] if len(changes) == 1 else None


@dataclass(frozen=True, slots=True)
class _Made:
    """Dense matrix of a change, computed from ``leaves``: the change's tensors as leaves of an autograd graph of its
    own.

    If ``form`` is None, autograd computes the gradients from the matrix's graph. Otherwise kernels compute them from
    the form.
    """

    leaves: list[Tensor]
    matrix: Tensor
    form: Form | None

    @classmethod
    def of(cls, change: Change, dtype: torch.dtype) -> _Made:
        leaves = leaves_of(change)
        with torch.enable_grad():
            return cls(leaves, *_matrix(change.with_tensors(leaves), dtype))

    def gradients(self, dz: Tensor, x: Tensor) -> Gradients:
        """Return the gradients of the product ``M x`` with respect to ``leaves``, given its gradient dz. The gradient
        of M is ``dzᵀ x``.
        """
        if not any(leaf.requires_grad for leaf in self.leaves):
            return (None,) * len(self.leaves)
        gradient = matmul(dz.T, x, x.dtype)
        if self.form is None:
            return gradients_in(self.leaves, self.matrix, gradient)
        return gradients_by_form(self.leaves, self.form, lambda form: entry_gradients(form, gradient))


def _matrix(change: Change, dtype: torch.dtype) -> tuple[Tensor, Form | None]:
    """Return the matrix of a change in ``dtype``, and the form from which a kernel computed it; None if torch computed
    it.
    """
    form = change.form()
    if form is not None and has_entries(form, dtype):
        return entries(form, dtype), form
    return change.dense(dtype), None


def _made_backward(change: Change, dz: Tensor, x: Tensor, dx: Tensor | None) -> Gradients:
    """Return the gradients with respect to a change's tensors, computed through its dense matrix. If ``dx`` is given,
    add the gradient with respect to x to it.
    """
    made = _Made.of(change, x.dtype)
    if dx is not None:
        add_matmul(dx, dz, made.matrix.detach())
    return made.gradients(dz, x)


def _form_backward(change: Change, dz: Tensor, x: Tensor, dx: Tensor | None) -> Gradients:
    """Return the gradients with respect to a change's tensors, computed by the kernels of its form. If ``dx`` is given,
    add the gradient with respect to x to it.
    """
    leaves, form = with_leaves(change)
    if dx is not None:
        map_rows(form, dz, dx, add=True, transposed=True)
    return gradients_by_form(leaves, form, lambda form: form_gradients(form, dz, x))


def _mixture_backward(change: LowRankMixture, dz: Tensor, x: Tensor, dx: Tensor | None) -> Gradients:
    """Return the gradients with respect to a mixture's tensors, and add the gradient with respect to x to ``dx``.

    Autograd runs only over what follows A; ``A x`` is computed again without it.
    """
    a, leaves = change.a.detach().to(x.dtype), leaves_of(change)
    inner = matmul(x, a.T, x.dtype).requires_grad_()
    with torch.enable_grad():
        v, b = change.with_tensors(leaves).outward(inner)
    found = [(v, matmul(dz, b.detach().T, x.dtype))]
    if b.requires_grad:
        found.append((b, matmul(v.detach().T, dz, x.dtype)))
    own, *gradients = gradients_in([inner, *leaves], *zip(*found, strict=True))
    dinner = cast(Tensor, own)
    if dx is not None:
        add_matmul(dx, dinner, a)
    da = matmul(dinner.T, x, x.dtype).to(change.a.dtype) if change.a.requires_grad else None
    return tuple(da if leaf is leaves[0] else gradient for leaf, gradient in zip(leaves, gradients, strict=True))


def _product_backward(change: Change, dz: Tensor, x: Tensor, dx: Tensor | None, layer: LinearLayer) -> Gradients:
    """Return the gradients with respect to a change's tensors, by autograd through its product with x. If ``dx`` is
    given, add the gradient with respect to x to it.
    """
    leaves, x = leaves_of(change), x.detach().requires_grad_(dx is not None)
    with torch.enable_grad():
        y = _rounded(change.with_tensors(leaves), x, layer).apply(x)
    own, *gradients = gradients_in([x, *leaves], y, dz.to(y.dtype))
    if dx is not None and own is not None:
        dx.add_(own)
    return tuple(gradients)


def _is_made(change: Change, x: Tensor, layer: LinearLayer) -> bool:
    """Return True if a product with rows like x uses the change's dense matrix: there are enough rows, and no kernel
    applies the change in factored form.
    """
    dtype = torch.float32 if x.device.type != "cuda" and float32_is_faster() else x.dtype  # of the matrix product
    by_matrix = layer.is_batch(len(x)) and change.is_made_for(len(x), dtype)
    return by_matrix and form_of(change, x, layer) is None


def _rounded(change: Change, x: Tensor, layer: LinearLayer) -> Change:
    return change.rounded(x.dtype) if layer.is_batch(len(x)) else change


def form_of(term: Term, x: Tensor, layer: LinearLayer) -> Form | None:
    """Return the term's form if a kernel multiplies rows such as x by it; None if there is no such kernel or x has too
    few rows.
    """
    form = term.form() if layer.is_batch(len(x)) else None
    return form if form is not None and has_kernel(form, x, traced_isa() or kernel_isa()) else None


def with_leaves(term: Term) -> tuple[list[Tensor], Form]:
    """Return a term's tensors as leaves, and its form computed from them under autograd."""
    leaves = leaves_of(term)
    with torch.enable_grad():
        return leaves, cast(Form, term.with_tensors(leaves).form())


def gradients_by_form(
    leaves: Sequence[Tensor], form: Form, numbers: Callable[[Form], tuple[Tensor, Tensor | None]]
) -> Gradients:
    """Return the gradients with respect to the leaves of `with_leaves`; None for a leaf that requires no gradient.

    ``numbers`` returns the gradients with respect to the form's ``values`` and ``second``.
    """
    trained = [t for t in (form.values, form.second) if t is not None and t.requires_grad]
    if not trained:
        return (None,) * len(leaves)
    found = dict(zip((id(form.values), id(form.second)), numbers(form), strict=True))
    given = [cast(Tensor, found[id(t)]).to(t.dtype) for t in trained]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    taken = iter(torch.autograd.grad(trained, wanted, given, allow_unused=True))
    return tuple(next(taken) if leaf.requires_grad else None for leaf in leaves)


def leaves_of(term: Term) -> list[Tensor]:
    """Return the tensors of a term, detached, as leaves from which a graph of its own can be computed."""
    return [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in term.tensors]


def gradients_in(leaves: Sequence[Tensor], y: Tensor | Sequence[Tensor], dy: Tensor | Sequence[Tensor]) -> Gradients:
    """Return the gradients with respect to the leaves, by a backward pass from y with the gradient dy; None for a leaf
    that requires none.
    """
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    found = iter(torch.autograd.grad(y, wanted, dy, allow_unused=True) if wanted else ())
    return tuple(next(found) if leaf.requires_grad else None for leaf in leaves)


def added_up(totals: Gradients, parts: Gradients) -> Gradients:
    """Return the elementwise sums of two lists of gradients; the parts alone if totals is empty."""
    return tuple(added(*both) for both in zip(totals, parts, strict=True)) if totals else parts


def added(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """Return the sum of two gradients; None counts as zero."""
    return part if total is None else total if part is None else total + part
