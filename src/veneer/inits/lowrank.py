"""Starts of A (r, i) and B (o, r) that leave the frozen weight alone: Kaiming, Gaussian, and both random."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

Factors = tuple[Float[Tensor, "r i"], Float[Tensor, "o r"]]


def kaiming(r: int, i: int, o: int, generator: torch.Generator | None = None) -> Factors:
    """A uniform in ±1/√i (Kaiming uniform with a = √5, He et al. 2015), B zero: loralib's and PEFT's default."""
    bound = 1 / math.sqrt(i)
    return torch.empty(r, i).uniform_(-bound, bound, generator=generator), torch.zeros(o, r)


def gaussian(r: int, i: int, o: int, generator: torch.Generator | None = None) -> Factors:
    """A normal with standard deviation 1/r, B zero (Hu et al. 2021, section 4.1; the deviation is PEFT's)."""
    return torch.randn(r, i, generator=generator) / r, torch.zeros(o, r)


def random(r: int, i: int, o: int, generator: torch.Generator | None = None) -> Factors:
    """Both factors uniform in ±1/√fan_in, so that the start is not the base model: for tests."""
    a, _ = kaiming(r, i, o, generator)
    bound = 1 / math.sqrt(r)
    return a, torch.empty(o, r).uniform_(-bound, bound, generator=generator)
