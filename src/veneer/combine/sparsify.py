"""Keeping a share of an update's entries: the largest, or a random draw."""

from __future__ import annotations

import zlib

import torch
from jaxtyping import Float
from torch import Tensor


def largest(update: Float[Tensor, "*shape"], density: float) -> Float[Tensor, "*shape"]:
    """The ``int(density * n)`` entries of largest magnitude, the others zero (Yadav et al. 2023, arXiv:2306.01708,
    section 4, trim).
    """
    kept = int(density * update.numel())
    flat = torch.zeros_like(update).flatten()
    index = update.abs().flatten().topk(kept, sorted=False).indices
    flat[index] = update.flatten()[index]
    return flat.view_as(update)


def draw_of(seed: int, name: str) -> torch.Generator:
    """The random numbers of one layer or tensor, from the seed and its name."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ seed)


def drop_and_rescale(
    update: Float[Tensor, "*shape"], density: float, generator: torch.Generator | None = None
) -> Float[Tensor, "*shape"]:
    """Each entry kept with probability ``density`` and divided by it, so that the expectation stays (DARE: Yu et al.
    2024, arXiv:2311.03099, section 3.1, with drop rate p = 1 - density)."""
    mask = torch.rand(update.shape, generator=generator, device="cpu").to(update.device) < density
    return (update * mask).div_(density)
