"""Sparsification of an update: keep a share of its entries, the largest or a random draw."""

from __future__ import annotations

import zlib

import torch
from jaxtyping import Float
from torch import Tensor


def largest(update: Float[Tensor, "*shape"], density: float) -> Float[Tensor, "*shape"]:
    """Return the ``int(density * n)`` entries of largest magnitude, with the others set to zero.

    Source: Yadav et al. 2023, arXiv:2306.01708, section 4, trim.
    """
    kept = int(density * update.numel())
    flat = torch.zeros_like(update).flatten()
    index = update.abs().flatten().topk(kept, sorted=False).indices
    flat[index] = update.flatten()[index]
    return flat.view_as(update)


def draw_of(seed: int, name: str) -> torch.Generator:
    """Return the random generator of one layer or tensor, from the seed and its name."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ seed)


def drop_and_rescale(
    update: Float[Tensor, "*shape"], density: float, generator: torch.Generator | None = None
) -> Float[Tensor, "*shape"]:
    """Keep each entry with probability ``density`` and divide it by ``density``, so that its expectation is unchanged;
    the others become zero.

    Source: DARE, Yu et al. 2024, arXiv:2311.03099, section 3.1, with drop rate p = 1 - density.
    """
    mask = torch.rand(update.shape, generator=generator, device="cpu").to(update.device) < density
    return (update * mask).div_(density)
