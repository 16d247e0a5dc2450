"""Packed terms, and forms of many rows, by csrc/terms."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.ops.cpu.module import DTYPES, kernels
from veneer.ops.memory import address
from veneer.ops.packed import ROWS, PackedWeight
from veneer.ops.reference import terms as reference
from veneer.ops.rows import put_back, with_rows
from veneer.ops.terms import TERM_KINDS, PackedTerm
from veneer.records.terms.form import Form


def apply(term: PackedTerm, x: Tensor, y: Tensor, add: bool) -> None:
    if x.dtype not in DTYPES:
        reference.apply(term, x, y, add)
        return
    rows, written = with_rows(x), with_rows(y)  # held until the kernel is done: either may be a copy
    kernels().terms_apply(
        TERM_KINDS.index(term.kind),
        list(term.sizes),
        address(term.values),
        0 if term.index is None else address(term.index),
        len(x),
        DTYPES[x.dtype],
        *(number for each in (rows, written) for number in (address(each), each.stride(0))),
        add,
    )
    put_back(written, y)


def make(term: PackedTerm, weight: PackedWeight) -> Tensor:
    if weight.dtype not in ROWS:
        return reference.make(term, weight)
    panels = torch.empty_like(weight.panels)
    kernels().terms_make(
        list(term.sizes),
        address(term.values),
        DTYPES[weight.dtype],
        weight.depth,
        *map(address, (weight.panels, panels)),
    )
    return panels


def map_rows(form: Form, x: Tensor, y: Tensor, add: bool, transposed: bool) -> None:
    if x.dtype not in DTYPES:
        reference.map_rows(form, x, y, add, transposed)
        return
    held, rows, written = _numbers(form), with_rows(x), with_rows(y)  # until the kernel is done: each may be a copy
    places = (number for each in (rows, written) for number in (address(each), each.stride(0)))
    kernels().terms_map(_form_at(form, held), transposed, len(x), DTYPES[x.dtype], *places, add)
    put_back(written, y)


def gradients(form: Form, dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
    if x.dtype not in DTYPES:
        return reference.gradients(form, dy, x)
    held, dy, x = _numbers(form), with_rows(dy), with_rows(x)
    values, second = torch.empty_like(held[0]), None if held[1] is None else torch.empty_like(held[1])
    places = (number for each in (dy, x) for number in (address(each), each.stride(0)))
    written = address(values), 0 if second is None else address(second)
    kernels().terms_gradients(_form_at(form, held), len(x), DTYPES[x.dtype], *places, *written)
    return values, second


def entries(form: Form, weight: Tensor) -> Tensor:
    if weight.dtype not in DTYPES:
        return reference.entries(form, weight)
    held, rows = _numbers(form), with_rows(weight)
    out = torch.empty(weight.shape, dtype=weight.dtype)
    kernels().terms_entries(_form_at(form, held), DTYPES[weight.dtype], address(rows), rows.stride(0), address(out))
    return out


def entry_gradients(form: Form, weight: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    if gradient.dtype not in DTYPES:
        return reference.entry_gradients(form, weight, gradient)
    held, rows = _numbers(form), [with_rows(x) for x in (weight, gradient)]
    found = tuple(torch.empty_like(t) for t in held[:2] if t is not None)
    places = (number for each in rows for number in (address(each), each.stride(0)))
    kernels().terms_entry_gradients(_form_at(form, held), DTYPES[gradient.dtype], *places, *map(address, found))
    return found[0], found[1]


def _numbers(form: Form) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return a form's values and second factor in float32, and its indices in int64; None for each that it does not
    have.
    """
    second = None if form.second is None else _floats(form.second)
    return _floats(form.values), second, None if form.places is None else form.places.long().contiguous()


def _floats(x: Tensor) -> Tensor:
    return x.detach().float().contiguous()


def _form_at(form: Form, held: tuple[Tensor, Tensor | None, Tensor | None]) -> list[int]:
    """Return the integers that ``form_at`` in csrc/terms/bindings.cpp reads: kind, four sizes, the addresses of the
    tensors ``held`` and the number of indices.

    ``held`` is the result of `_numbers`.
    """
    sizes = (*form.sizes, 0, 0)[:4]
    n_places = 0 if held[2] is None else len(held[2])
    return [TERM_KINDS.index(form.kind), *sizes, *(0 if t is None else address(t) for t in held), n_places]
