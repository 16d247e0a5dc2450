"""Initialisation of A (r, i) and B (o, r) that does not depend on the frozen weight: Kaiming, Gaussian,
or both random.
"""

from __future__ import annotations

import math

import torch

from veneer.inits import Factors, Start
from veneer.records.sites import LinearSite

NAMES = ("True", "'gaussian'", "False")


def find(name: bool | str) -> Start | None:
    """Return the initialisation; None for another name. True: Kaiming A and zero B. "gaussian": Gaussian A and zero B.

    False: both random, so that the start is not the base model.
    """
    return {True: Start(kaiming), "gaussian": Start(gaussian), False: Start(random)}.get(name)


def kaiming(site: LinearSite, r: int, scale: float, generator: torch.Generator | None = None) -> Factors:
    """Return A uniform in ±1/√i (Kaiming uniform with a = √5, He et al. 2015), B zero: loralib's and PEFT's default."""
    if site.kind == "embedding":
        return _embedding(site, r, generator)
    bound = 1 / math.sqrt(site.in_features)
    a = torch.empty(r, site.in_features).uniform_(-bound, bound, generator=generator)
    return a, torch.zeros(site.out_features, r)


def gaussian(site: LinearSite, r: int, scale: float, generator: torch.Generator | None = None) -> Factors:
    """Return A normal with standard deviation 1/r, B zero (Hu et al. 2021, section 4.1; the deviation is PEFT's)."""
    if site.kind == "embedding":
        return _embedding(site, r, generator)
    return torch.randn(r, site.in_features, generator=generator) / r, torch.zeros(site.out_features, r)


def random(site: LinearSite, r: int, scale: float, generator: torch.Generator | None = None) -> Factors:
    """Return both factors uniform in ±1/√fan_in."""
    bound_a, bound_b = 1 / math.sqrt(site.in_features), 1 / math.sqrt(r)
    a = torch.empty(r, site.in_features).uniform_(-bound_a, bound_a, generator=generator)
    return a, torch.empty(site.out_features, r).uniform_(-bound_b, bound_b, generator=generator)


def _embedding(site: LinearSite, r: int, generator: torch.Generator | None) -> Factors:
    """Initialise an embedding's factors. Its columns of A are looked up, so A is zero and B random, as in loralib and
    PEFT.
    """
    return torch.zeros(r, site.in_features), torch.randn(site.out_features, r, generator=generator)
