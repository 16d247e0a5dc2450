"""HRA: ``W Π (I - 2 u uᵀ)``, the weight times a chain of r reflections (Yuan et al. 2024, arXiv:2405.17484, eq. 4).

The chain is ``I - U T Uᵀ`` with U (i, r) of the unit vectors and T triangular: ``T⁻¹ = I/2 + triu(UᵀU, 1)``. This is
the compact WY form (Schreiber and Van Loan 1989). So the update is a pair of rank r, ``A = Uᵀ`` and ``B = -W U T``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from veneer.contract import LinearMethod, Params, Shapes
from veneer.contract.checks import Checks, GroupChecks
from veneer.contract.family_targets import LOW_RANK
from veneer.contract.needed import needed_weight
from veneer.contract.patterns import below_one
from veneer.contract.targets import FamilyTargets
from veneer.inits.uniform import kaiming_uniform
from veneer.records.deltas import LinearDelta
from veneer.records.sites import LinearSite


@dataclass(frozen=True, kw_only=True)
class HRAConfig(LinearMethod):
    """Settings of HRA, with the names that PEFT gives them. ``r`` is the number of reflections.

    ``apply_GS`` makes the vectors orthogonal, one after the other (Gram-Schmidt). With ``init_weights`` and an even
    ``r`` they start as equal pairs, whose reflections cancel.
    Difference from PEFT: with ``apply_GS`` all vectors start at random, because equal vectors cannot be made
    orthogonal. PEFT normalizes their rounding error instead.
    """

    peft_type: ClassVar[str] = "HRA"
    headline: ClassVar[tuple[str, ...]] = ("r", "target_modules")
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "convolution"})
    family_targets: ClassVar[FamilyTargets] = LOW_RANK
    inert: ClassVar[frozenset[str]] = frozenset({"r", "bias", "init_weights"})

    r: int = 8
    apply_GS: bool = False  # noqa: N815 - PEFT's name
    init_weights: bool = True
    bias: Literal["none", "all", "hra_only"] = "none"

    def problems(self) -> list[str]:
        return super().problems() + below_one({"r": self.r})

    @property
    def checks(self) -> Checks:
        return GroupChecks()

    @property
    def largest_rank(self) -> int:
        return self.r

    @property
    def reads_weight(self) -> bool:
        return True

    def shapes(self, site: LinearSite) -> Shapes:
        return {"hra_u": (site.in_features, self.r)}

    def init(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        if not self.init_weights or self.r % 2 or self.apply_GS:
            return {"hra_u": kaiming_uniform((site.in_features, self.r), generator)}
        return {"hra_u": kaiming_uniform((site.in_features, self.r // 2), generator).repeat_interleave(2, dim=1)}

    def lower(self, site: LinearSite, params: Params) -> LinearDelta:
        weight = needed_weight(site, "HRA")
        u = params["hra_u"]
        dtype = u.dtype
        u = u.to(torch.promote_types(dtype, torch.float32))  # torch solves no systems in 16 bits
        if self.apply_GS:
            a = torch.linalg.qr(u).Q.T
            return LinearDelta.pair(a.to(dtype), -2 * weight.matmul(a).to(dtype).T)
        a = (u / u.norm(dim=0)).T
        identity = torch.eye(len(a), dtype=a.dtype, device=a.device)
        t = torch.linalg.solve_triangular(torch.triu(a @ a.T, 1) + 0.5 * identity, identity, upper=True)
        b = weight.matmul(a).to(a.dtype).T @ -t  # T first: it is small, and so is its gradient
        return LinearDelta.pair(a.to(dtype), b.to(dtype))
