"""LoRA-GA: the factors start as singular vectors of the gradient of the weight, so that the first steps follow it.

Source: Wang et al. 2024, arXiv:2407.05000, section 3.2 and algorithm 1; the directions and scales are PEFT's. The
update subtracts the initial product, as PiSSA's does, so that the start is the base.

Difference from PEFT: the scale "stable" reads the count of outputs in layers that store Wᵀ too (PEFT: of inputs).
"weight_svd" takes the exact norm of the weight (PEFT: a randomized one).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.contract.settings import Settings
from veneer.errors import ConfigError
from veneer.inits import Factors, Start, dense_weight
from veneer.inits.lowrank import kaiming
from veneer.inits.pissa import leading_triplets
from veneer.records.sites import LinearSite

NAMES = ("'lora_ga'",)
_POWER_ITERATIONS = 4


def find(name: bool | str) -> Start | None:
    """Return the initialisation "lora_ga"; None for another name. It is plain LoRA's until a pass over data gives the
    gradients.
    """
    return Start(kaiming, taken_off=True) if name == "lora_ga" else None


@dataclass(frozen=True)
class LoraGAConfig(Settings):
    """Settings of LoRA-GA, with PEFT's names for the fields.

    ``direction``: how A and B share the gradient's 2 r leading singular triplets. "ArB2r" gives A the first r and B the
    others, "A2rBr" the reverse. "ArBr" gives A and B alternate triplets, and "random" gives both the same r random
    ones. ``scale``: "stable" multiplies B by ``(o / stable_gamma²)^¼``, "weight_svd" gives B's first column the norm of
    the weight, "gd_scale" divides both by the scale of B A, "unit" leaves them unchanged.
    """

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: float = 16

    def problems(self) -> list[str]:
        return [] if self.stable_gamma > 0 else [f"stable_gamma={self.stable_gamma!r} must be above 0"]


def of_gradient(
    site: LinearSite,
    gradient: Float[Tensor, "o i"],
    shape: tuple[int, float],
    settings: LoraGAConfig,
    generator: torch.Generator | None = None,
) -> Factors:
    """Return A (r, i) and B (o, r) in float32 on the CPU, from the gradient of the weight; ``shape`` is r and the scale
    of B A. Raises ConfigError if the weight has fewer than 2 r directions.
    """
    r, scale = shape
    problems = rank_problems(site, r)
    if problems:
        raise ConfigError("; ".join(problems))
    u, s, vt = leading_triplets(gradient.float(), 2 * r, _POWER_ITERATIONS, generator)
    of_a, of_b = _places(r, settings.direction, generator)
    a, b = vt[of_a], u[:, of_b] * s[of_b]
    if settings.scale == "stable":
        b = b * (site.out_features**0.25 / settings.stable_gamma**0.5)
    elif settings.scale == "gd_scale":
        a, b = a / scale, b / scale
    elif settings.scale == "weight_svd" and s[of_b[0]] > 0:
        norm = torch.linalg.matrix_norm(dense_weight(site, r, "LoRA-GA"), 2)
        b = b * (norm / s[of_b[0]])
    return a.cpu().contiguous(), b.cpu().contiguous()


def rank_problems(site: LinearSite, r: int) -> list[str]:
    """Return a message, alone in a list, if a layer's weight has fewer than 2 r directions; otherwise an empty list."""
    o, i = site.out_features, site.in_features
    if 2 * r <= min(o, i):
        return []
    return [
        f"LoRA-GA at {site.name}: r={r} needs {2 * r} directions, and a weight of shape {(o, i)} has {min(o, i)}: give "
        f"r={min(o, i) // 2} or less"
    ]


def _places(r: int, direction: str, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Return the indices (from 0) of the r singular triplets from which A starts, and of those from which B starts, by
    ``direction``.
    """
    first, last = torch.arange(r), torch.arange(r, 2 * r)
    if direction == "random":
        drawn = torch.randperm(2 * r, generator=generator)[:r]
        return drawn, drawn
    pairs = {"ArB2r": (first, last), "A2rBr": (last, first), "ArBr": (2 * first + 1, 2 * first)}
    return pairs[direction]
