"""Rotations in small blocks as batched products: ``M x = x + (M - I) x``.

A rotation stays near the identity, and the difference alone is rounded to x's dtype. Neighbouring blocks are joined to
larger ones, with zeros between them: products of 8 by 8 numbers leave most of a matrix unit idle.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.ops.matmul import operand
from veneer.records.terms.rotation import Rotation

WIDTH = 64
"""Of the joined blocks."""


def less_identity(term: Rotation, dtype: torch.dtype) -> Float[Tensor, "k b b"] | None:
    """Return the blocks of ``M - I`` in a dtype, differentiable in the term's tensors; None if M has entries outside of
    blocks.
    """
    blocks = term.blocks_of_map()
    if blocks is None:
        return None
    less = blocks - torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    return _joined(less).to(dtype)


def _joined(blocks: Float[Tensor, "k b b"]) -> Float[Tensor, "_ _ _"]:
    """Return the same block-diagonal matrix in larger blocks, of at most `WIDTH`."""
    k, b, _ = blocks.shape
    n = max((n for n in range(1, WIDTH // b + 1) if k % n == 0), default=1)
    if n == 1:
        return blocks
    diagonal = torch.diag_embed(blocks.view(-1, n, b, b).permute(0, 2, 3, 1))  # (…, b, b, n, n)
    return diagonal.permute(0, 3, 1, 4, 2).reshape(k // n, n * b, n * b)


def turn(x: Float[Tensor, "n d"], less: Float[Tensor, "k b b"], out: Float[Tensor, "n d"]) -> None:
    """Write ``x + N x`` into ``out``, rounded once. N is the block-diagonal matrix of ``less``. ``out`` may be x."""
    parts = _parts(operand(x), less)
    _parts(out, less).copy_(torch.baddbmm(parts, parts, less.mT.to(parts.dtype)))


def blocks_gradient(
    dy: Float[Tensor, "n d"], x: Float[Tensor, "n d"], less: Float[Tensor, "k b b"]
) -> Float[Tensor, "k b b"]:
    """Return the gradient of `turn` in the blocks."""
    return torch.bmm(_parts(operand(dy), less).mT, _parts(operand(x), less)).to(x.dtype)


def _parts(x: Float[Tensor, "n d"], less: Float[Tensor, "k b b"]) -> Float[Tensor, "k n b"]:
    return x.view(len(x), *less.shape[:2]).transpose(0, 1)
