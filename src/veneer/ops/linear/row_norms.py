"""Norms of the rows of a weight with a low-rank update, by which DoRA divides; the update is never formed."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.errors import ShapeError
from veneer.ops.dispatch import implementation
from veneer.ops.reference import row_norms as reference


def row_norms(
    row_sq: Float[Tensor, " o"],
    wa: Float[Tensor, "r o"],
    a: Float[Tensor, "r i"],
    b: Float[Tensor, "o r"],
    scale: float,
    *,
    least: float = 0.0,
    backend: str | None = None,
) -> Float[Tensor, " o"]:
    """Return the Euclidean norms of the rows of ``W + scale B A`` in B's dtype, each at least ``least``.

    ``row_sq`` are the squared norms of W's rows, and ``wa`` is W applied to the rows of A. For each row w of W and b of
    B, with s for scale:

    ``|w + s b A|² = |w|² + 2 s b·(A w) + s² b (A Aᵀ) bᵀ``

    The cost is one product of size (o, r, r). Autograd records nothing on a GPU. Raises ShapeError if something does
    not fit.
    """
    (o, rank), i = b.shape, a.shape[-1]
    if row_sq.shape != (o,) or wa.shape != (rank, o) or a.shape != (rank, i):
        raise ShapeError(
            f"B is {(o, rank)}, so row_sq must be ({o},), wa {(rank, o)} and A have {rank} rows; given "
            f"{tuple(row_sq.shape)}, {tuple(wa.shape)} and {tuple(a.shape)}"
        )
    if backend is None and (torch.compiler.is_compiling() or not b.is_cuda):
        return reference.row_norms(row_sq, wa, a, b, scale, least)  # torch.compile reads no choice of a kernel
    norms: Tensor = implementation("row_norms.row_norms", b.device, backend)(row_sq, wa, a, b, scale, least)
    return norms
