"""Block-diagonal matrices of grouped convolutions, and their stacked blocks.

The blocks are stacked along the rows.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def block_diagonal(blocks: Float[Tensor, "o k"], groups: int) -> Float[Tensor, "o gk"]:
    """Return the block-diagonal matrix (o, groups · k) of blocks of shape (o / groups, k)."""
    if groups == 1:
        return blocks
    own = torch.eye(groups, dtype=blocks.dtype, device=blocks.device)
    return torch.einsum("gok,gh->gohk", blocks.view(groups, -1, blocks.shape[1]), own).reshape(blocks.shape[0], -1)


def diagonal_blocks(matrix: Float[Tensor, "o gk"], groups: int) -> Float[Tensor, "o k"]:
    """Return the diagonal blocks of a matrix; all other entries are dropped."""
    if groups == 1:
        return matrix
    rows, columns = matrix.chunk(groups), matrix.shape[1] // groups
    return torch.cat([part[:, place * columns : (place + 1) * columns] for place, part in enumerate(rows)])


def column_blocks(vector: Float[Tensor, " gk"], rows: int, groups: int) -> Float[Tensor, "o k"]:
    """Return the diagonal blocks (o, k), with o = ``rows``, of the matrix whose rows all equal ``vector``."""
    blocks = vector.view(groups, 1, -1)
    return blocks.expand(groups, rows // groups, -1).reshape(rows, -1)
