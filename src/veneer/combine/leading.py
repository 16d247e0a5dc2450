"""Leading singular vectors of a large matrix, without a decomposition of the whole."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

LEAST_COLUMNS = 1024  # below, the eigenvectors of the whole Gram matrix take less time
_OVERSAMPLED = 8
_LARGEST_SHARE = 4  # of the columns: a basis of more than a fourth of them costs as much as the whole
_RELATIVE, _ABSOLUTE = 1e-6, 1e-13  # residual of an eigenpair, by its own eigenvalue and by the largest


def leading(matrix: Float[Tensor, "m n"], rank: int) -> tuple[Float[Tensor, " r"], Float[Tensor, "n r"]] | None:
    """Return the ``rank`` largest squared singular values in falling order, and their right singular vectors.

    Products with the matrix and its transpose span a Krylov space, block by block, until each pair ``(e, v)`` has a
    residual ``|MᵀM v - e v|`` of at most 1e-6 e (1e-13 of the largest e, if that is more). ``matrix`` is in float64.
    Returns None if the space would need more than a fourth of the columns.

    Source: block Krylov iteration, Musco and Musco 2015, arXiv:1504.05477, algorithm 2. Difference from it:
    the number of blocks follows from the residuals.
    """
    width = rank + _OVERSAMPLED
    draw = torch.randn(matrix.shape[1], width, generator=torch.Generator().manual_seed(0), dtype=matrix.dtype)
    basis = torch.linalg.qr(draw.to(matrix.device))[0]
    images = matrix @ basis
    returned = matrix.T @ images
    while True:
        energy, small = torch.linalg.eigh(images.T @ images)  # in ascending order
        energy, small = energy.flip(0)[:rank].clamp(min=0.0), small.flip(1)[:, :rank]
        vectors = basis @ small
        residual = (returned @ small - vectors * energy).norm(dim=0)
        if bool((residual <= torch.maximum(_RELATIVE * energy, _ABSOLUTE * energy[0])).all()):
            return energy, vectors
        if (basis.shape[1] + width) * _LARGEST_SHARE > matrix.shape[1]:
            return None
        block = _orthogonal(returned[:, -width:], basis)
        image = matrix @ block
        basis, images = torch.cat([basis, block], dim=1), torch.cat([images, image], dim=1)
        returned = torch.cat([returned, matrix.T @ image], dim=1)


def _orthogonal(block: Tensor, basis: Tensor) -> Tensor:
    """Return an orthonormal basis of the block's columns after their projection onto ``basis`` is subtracted.

    The subtraction is repeated, because rounding leaves a small part the first time.
    """
    for _ in range(2):
        block = torch.linalg.qr(block - basis @ (basis.T @ block))[0]
    return block
