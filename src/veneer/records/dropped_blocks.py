"""Multiplicative dropout: some blocks of a rotation are the identity in a training pass (Qiu et al. 2023,
arXiv:2306.07280).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

DROPPED = "dropped"
"""Name of the blocks that are dropped, beside a method's parameters."""


def dropped_blocks(n: int, share: float, generator: torch.Generator | None = None) -> Bool[Tensor, " n"]:
    """Return a mask of n blocks, True if dropped: floor(``share`` · n) random ones."""
    return (torch.arange(n) < int(share * n))[torch.randperm(n, generator=generator)]


def identity_at(dropped: Bool[Tensor, "*n"], blocks: Float[Tensor, "*n b b"]) -> Float[Tensor, "*n b b"]:
    """Return the blocks, with the dropped ones replaced by the identity."""
    identity = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    return torch.where(dropped[..., None, None], identity, blocks)
