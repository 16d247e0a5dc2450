"""Linear maps of many rows, as in a training step, each given as a `Form`; with gradients in the form's numbers.

If a form multiplies a frozen weight entry by entry, `entries` computes the product as a matrix.

Kernels read the form as it is. Products and sums are in float32, and a result is rounded once to the rows' dtype.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.errors import ShapeError
from veneer.ops.dispatch import backends, implementation
from veneer.records.terms.form import Form

KINDS = ("blocks", "sparse", "kronecker")
LARGEST_BLOCK = 64
"""Larger blocks are faster as batched products in 16 bits."""
MOST_PLACES = 1 / 8
"""Share of a weight's places from which on a matrix product is faster."""
LEAST_SAVED = 6
"""Multiplications of a matrix for one of a Kronecker product, from which on its kernel is faster.

The kernel multiplies in float32, and a matrix product in the rows' dtype. Measured are a step's maps and gradients of
2,048 rows in bfloat16 (AMD EPYC, Zen 4, AVX-512-BF16, 2 threads). With 4, of 576 features, the kernel took 46 ms and
the matrix 39; with 5.6, 36 and 34; with 7.2, 29 and 35; with 12, 25 and 31.
"""
MOST_OF_SECOND = 1 << 16
"""Values of a second factor up to which a Kronecker product has a kernel.

Its gradients keep a sum of as many in float32 for each 64 rows: they take at most 4 KB a row.
"""
MATRIX_ROWS = 512
"""Rows from which on tiles (AMX) multiply by the matrix of a Kronecker product faster."""


def shape_of(form: Form) -> tuple[int, int]:
    """Return the shape (o, i) of a form of `KINDS`."""
    sizes = form.sizes
    if form.kind == "blocks":
        return sizes[0] * sizes[1], sizes[0] * sizes[1]
    return (sizes[0], sizes[1]) if form.kind == "sparse" else (sizes[0] * sizes[2], sizes[1] * sizes[3])


def has_kernel(form: Form, x: Tensor, isa: str) -> bool:
    """Return True if a kernel maps rows such as x by this form, in little memory, and no other way is faster.

    ``isa`` is the instruction set of the kernels. Forms in float64 have no kernel, since it would round them.
    """
    if form.kind not in KINDS or not x.is_cpu or "cpu" not in backends("terms.map_rows"):
        return False
    if torch.promote_types(form.values.dtype, x.dtype) == torch.float64:
        return False
    if form.kind == "blocks":
        return form.sizes[1] <= LARGEST_BLOCK
    if form.kind == "sparse":
        return len(form.values) <= MOST_PLACES * form.sizes[0] * form.sizes[1]
    o1, _, o2, i2 = form.sizes
    if o1 * i2 < LEAST_SAVED * (o1 + i2) or o2 * i2 > MOST_OF_SECOND:  # o i / (i o2 + i1 o) is o1 i2 / (o1 + i2)
        return False
    return isa != "amx" or len(x) < MATRIX_ROWS


def map_rows(
    form: Form,
    x: Float[Tensor, "n i"],
    out: Float[Tensor, "n o"],
    *,
    add: bool,
    transposed: bool = False,
    backend: str | None = None,
) -> None:
    """Write ``M x``, with M the form's matrix, into ``out``, or add it to ``out`` if ``add``. If ``transposed``, Mᵀ
    takes the place of M.

    If the form is block-diagonal, out may be x. Raises ShapeError if something does not fit.
    """
    o, i = shape_of(form)[:: -1 if transposed else 1]
    if x.shape != (len(out), i) or out.shape[1] != o or x.dtype != out.dtype:
        raise ShapeError(
            f"a map of shape {(o, i)} takes rows of {i} values to rows of {o} in the same dtype; given "
            f"{tuple(x.shape)} {x.dtype} and {tuple(out.shape)} {out.dtype}"
        )
    if len(x):
        implementation("terms.map_rows", x.device, backend)(form, x, out, add, transposed)


def form_gradients(
    form: Form, dy: Float[Tensor, "n o"], x: Float[Tensor, "n i"], *, backend: str | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of `map_rows` in the form's ``values`` and ``second``, in float32.

    The second one is None if the form has no ``second``. Raises ShapeError if something does not fit.
    """
    o, i = shape_of(form)
    if dy.shape != (len(x), o) or x.shape[1] != i or x.dtype != dy.dtype:
        raise ShapeError(
            f"gradients of a map of shape {(o, i)} need dy (n, {o}) and x (n, {i}) of one dtype; given "
            f"{tuple(dy.shape)} {dy.dtype} and {tuple(x.shape)} {x.dtype}"
        )
    kernel = implementation("terms.gradients", x.device, backend)
    values, second = kernel(form, dy, x)
    return values, second


def has_entries(form: Form | None, dtype: torch.dtype) -> bool:
    """Return True if a kernel computes the matrix of this form in a dtype."""
    if form is None or form.base is None or "cpu" not in backends("terms.entries"):
        return False
    return form.values.is_cpu and torch.promote_types(form.values.dtype, dtype) != torch.float64


def entries(form: Form, dtype: torch.dtype, *, backend: str | None = None) -> Float[Tensor, "o i"]:
    """Return ``W ⊙ (B A)`` of a hadamard form in ``dtype``: W is rounded to it first, and the result once.

    Raises ShapeError if W is of another shape.
    """
    weight = _weight_of(form, dtype)
    made: Tensor = implementation("terms.entries", weight.device, backend)(form, weight)
    return made


def entry_gradients(
    form: Form, gradient: Float[Tensor, "o i"], *, backend: str | None = None
) -> tuple[Float[Tensor, "r i"], Float[Tensor, "o r"]]:
    """Return the gradients with respect to A and B, in float32, given the gradient with respect to the result of
    `entries`.

    Raises ShapeError if something does not fit.
    """
    weight = _weight_of(form, gradient.dtype)
    if gradient.shape != weight.shape:
        raise ShapeError(
            f"the gradient has shape {tuple(gradient.shape)}: it must be that of the matrix {tuple(weight.shape)}"
        )
    a, b = implementation("terms.entry_gradients", weight.device, backend)(form, weight, gradient)
    return a, b


def _weight_of(form: Form, dtype: torch.dtype) -> Tensor:
    weight = None if form.base is None else form.base.weight.dense(dtype)
    if weight is None or tuple(weight.shape) != form.sizes[:2]:
        raise ShapeError(
            f"a form of {form.sizes} multiplies a weight of its own shape; given "
            f"{'none' if weight is None else tuple(weight.shape)}"
        )
    return weight
