"""Packed terms and forms in plain torch, as matrices: the specification."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from veneer.errors import ShapeError
from veneer.ops.packed import BLOCK, DEPTH_UNIT, PackedWeight
from veneer.ops.terms import PADDING, PackedTerm
from veneer.records.channel_groups import block_diagonal
from veneer.records.terms.form import Form


def apply(term: PackedTerm, x: Tensor, y: Tensor, add: bool) -> None:
    mapped = x.float() @ dense(term).T
    y.copy_(y.float() + mapped if add else mapped)


def dense(term: PackedTerm) -> Tensor:
    """Return the matrix (o, i) in float32."""
    sizes, values, index = term.sizes, term.values, term.index
    if term.kind == "blocks":
        k, b = sizes
        return block_diagonal(values[..., :b].mT.reshape(k * b, b), k)
    if term.kind == "sparse" and index is not None:
        o, i = sizes
        starts, columns = index[: o + 1], index[o + 1 :]
        rows = torch.repeat_interleave(torch.arange(o, device=values.device), (starts[1:] - starts[:-1]).long())
        return values.new_zeros(o, i).index_put_((rows, columns.long()), values)
    if term.kind == "kronecker":
        o1, i1, o2, i2 = sizes
        first = values[: o1 * i1].view(o1, i1)
        second = values[o1 * i1 + -(o1 * i1) % PADDING :].view(i2, -1)[:, :o2].T
        return torch.kron(first, second.contiguous())
    if term.kind != "circulant":
        raise ShapeError(f"a {term.kind} term has no matrix without the frozen weight: call `times_weight`")
    m, n, b = sizes
    places = (torch.arange(b)[:, None] - torch.arange(b)) % b  # row p, column j: at p - j, counted backwards
    return values[..., :b][..., places.to(values.device)].transpose(1, 2).reshape(m * b, n * b)


def make(term: PackedTerm, weight: PackedWeight) -> Tensor:
    """Return the panels of ``W ⊙ (B A)``.

    If W is bfloat16, the factors are rounded to bfloat16 first, as in training.
    """
    o, i, r = term.sizes
    depth, values = i + -i % DEPTH_UNIT, term.values
    if weight.dtype == torch.bfloat16:
        values = values.bfloat16().float()
    a, b = values[: r * depth].view(r, depth)[:, :i], values[r * depth :].view(-1, r, BLOCK)
    factors = b.mT.reshape(-1, r)[:o] @ a
    return PackedWeight.pack((weight.dense().float() * factors).to(weight.dtype)).panels


def map_rows(form: Form, x: Tensor, y: Tensor, add: bool, transposed: bool) -> None:
    wide = torch.promote_types(x.dtype, torch.float32)
    matrix = matrix_of(form).detach().to(wide)
    mapped = x.to(wide) @ (matrix if transposed else matrix.T)
    y.copy_(y.to(wide) + mapped if add else mapped)


def gradients(form: Form, dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
    wide = torch.promote_types(x.dtype, torch.float32)
    leaves = [t.detach().to(wide).requires_grad_() for t in (form.values, form.second) if t is not None]
    with torch.enable_grad():
        matrix = matrix_of(replace(form, values=leaves[0], second=leaves[1] if len(leaves) > 1 else None))
        found = torch.autograd.grad(matrix, leaves, dy.to(wide).T @ x.to(wide))
    return found[0], found[1] if len(found) > 1 else None


def matrix_of(form: Form) -> Tensor:
    """Return the matrix (o, i) of a form, differentiable in its numbers."""
    values, second, places = form.values, form.second, form.places
    if form.kind == "blocks":
        return block_diagonal(values.flatten(0, 1), len(values))
    if form.kind == "sparse" and places is not None:
        o, i = form.sizes
        return values.new_zeros(o * i).index_put((places.long(),), values).view(o, i)
    if form.kind == "kronecker" and second is not None:
        return torch.kron(values, second)
    raise ShapeError(f"a {form.kind} form of {form.sizes} is not one that has gradients")


def entries(form: Form, weight: Tensor) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (_factors(form, wide) * weight.to(wide)).detach().to(weight.dtype)


def entry_gradients(form: Form, weight: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(gradient.dtype, torch.float32)
    leaves = [t.detach().to(wide).requires_grad_() for t in (form.values, form.second) if t is not None]
    with torch.enable_grad():
        made = _factors(replace(form, values=leaves[0], second=leaves[1]), wide)
        a, b = torch.autograd.grad(made, leaves, gradient.to(wide) * weight.to(wide))
    return a, b


def _factors(form: Form, dtype: torch.dtype) -> Tensor:
    """Return ``B A`` of a hadamard form in ``dtype``. Raises ShapeError for any other kind of form."""
    if form.kind != "hadamard" or form.second is None:
        raise ShapeError(f"a {form.kind} form of {form.sizes} multiplies no weight")
    return form.second.to(dtype) @ form.values.to(dtype)
