"""GraLoRA: ``W + s ΔW``, ΔW made of k by k blocks, each of rank r / k (Jung et al. 2025, arXiv:2505.20355, eq. 5).

It is a pair of rank k r. A row of A reads one block of the inputs, and a column of B writes one block of the outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.contract import LinearMethod, Params, Shapes
from veneer.contract.checks import Checks
from veneer.contract.family_targets import LOW_RANK
from veneer.contract.patterns import below_one
from veneer.contract.peft_fields import PeftFields
from veneer.contract.targets import FamilyTargets
from veneer.inits.uniform import kaiming_uniform
from veneer.records.deltas import LinearDelta
from veneer.records.sites import LinearSite


@dataclass(frozen=True, kw_only=True)
class GraloraConfig(LinearMethod):
    """Settings of GraLoRA, with the names that PEFT gives them.

    ``gralora_k`` divides ``r`` and the widths of each layer.

    ``hybrid_r`` is the rank of a plain LoRA that is added. ``alpha``: the scale s is ``alpha / (r + hybrid_r)``.
    ``init_weights`` starts with B zero; False makes all factors random.
    """

    peft_type: ClassVar[str] = "GRALORA"
    headline: ClassVar[tuple[str, ...]] = ("r", "alpha", "gralora_k", "target_modules")
    outward: ClassVar[frozenset[str]] = frozenset({"gralora_B", "gralora_B_general"})
    family_targets: ClassVar[FamilyTargets] = LOW_RANK
    peft_fields: ClassVar[PeftFields] = PeftFields(quiet=("exclude_modules",))
    inert: ClassVar[frozenset[str]] = frozenset(
        {"r", "hybrid_r", "gralora_k", "gralora_dropout", "fan_in_fan_out", "bias", "init_weights"}
    )

    r: int = 32
    hybrid_r: int = 0
    alpha: float = 64
    gralora_dropout: float = 0.0
    gralora_k: int = 2
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "gralora_only"] = "none"
    init_weights: bool = True

    def problems(self) -> list[str]:
        found = super().problems() + below_one({"r": self.r, "gralora_k": self.gralora_k})
        if self.hybrid_r < 0:
            found.append(f"hybrid_r={self.hybrid_r!r} must be at least 0")
        if not 0 <= self.gralora_dropout < 1:
            found.append(f"gralora_dropout={self.gralora_dropout!r} must lie in [0, 1)")
        if self.gralora_k > 0 and self.r % self.gralora_k:
            found.append(f"gralora_k={self.gralora_k!r} does not divide r={self.r!r}: give a divisor of {self.r}")
        return found

    @property
    def checks(self) -> Checks:
        return _Checks(self.gralora_k)

    @property
    def largest_rank(self) -> int:
        return self.gralora_k * self.r + self.hybrid_r

    @property
    def dropout(self) -> float:
        return self.gralora_dropout

    def shapes(self, site: LinearSite) -> Shapes:
        k, r, o, i = self.gralora_k, self.r, site.out_features, site.in_features
        blocks: Shapes = {"gralora_A": (k, i // k, r), "gralora_B": (k, r, o // k)}
        general: Shapes = {"gralora_A_general": (self.hybrid_r, i), "gralora_B_general": (o, self.hybrid_r)}
        return blocks | (general if self.hybrid_r else {})

    def init(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        found = {}
        for name, shape in self.shapes(site).items():
            turned = (*shape[:-2], shape[-1], shape[-2]) if len(shape) == 3 else shape
            flat = kaiming_uniform((math.prod(turned[:-1]), turned[-1]), generator).view(turned)
            drawn = flat.mT.contiguous() if len(shape) == 3 else flat
            found[name] = torch.zeros_like(drawn) if self.init_weights and name in self.outward else drawn
        return found

    def disk_names(self, site: LinearSite) -> dict[str, str]:
        return {name: f"{name}.weight" if name.endswith("general") else name for name in self.shapes(site)}

    def lower(self, site: LinearSite, params: Params) -> LinearDelta:
        a, b = spread(params["gralora_A"], params["gralora_B"])
        if self.hybrid_r:
            a = torch.cat([a, params["gralora_A_general"]])
            b = torch.cat([b, params["gralora_B_general"]], dim=1)
        return LinearDelta.pair(a, b, self.alpha / (self.r + self.hybrid_r))

    @property
    def samples(self) -> tuple[LinearSite, ...]:
        return tuple(replace(each, in_features=self.gralora_k, out_features=self.gralora_k) for each in super().samples)

    def site_of(self, site: LinearSite, shapes: Mapping[str, tuple[int, ...]]) -> LinearSite:
        (k, inner, _), (_, _, outer) = shapes["gralora_A"], shapes["gralora_B"]
        return replace(site, in_features=k * inner, out_features=k * outer)


def spread(a: Float[Tensor, "k i r"], b: Float[Tensor, "k r o"]) -> tuple[Tensor, Tensor]:
    """Return all blocks as one pair, A (k r, k i) and B (k o, k r).

    Block (m, n) of the change reads the r / k columns of ``a[n]`` that belong to m, and the rows of ``b[m]`` that
    belong to n.
    """
    k, _, r = a.shape
    one = torch.eye(k, dtype=a.dtype, device=a.device)
    parts = a.view(k, -1, k, r // k).permute(2, 0, 3, 1)  # (m, n, r / k, i)
    big_a = (parts[:, :, :, None] * one[:, None, :, None]).reshape(k * r, -1)
    big_b = (b.mT[:, :, None] * one[:, None, :, None]).reshape(-1, k * r)
    return big_a, big_b


@dataclass(frozen=True)
class _Checks(Checks):
    k: int

    def layers(self, sites: Sequence[LinearSite]) -> list[str]:
        return [
            f"gralora_k={self.k} does not divide the {site.in_features} inputs and {site.out_features} outputs of "
            f"{site.name}: give a divisor of {math.gcd(site.in_features, site.out_features)}"
            for site in sites
            if math.gcd(site.in_features, site.out_features) % self.k
        ]
