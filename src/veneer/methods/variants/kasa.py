"""KaSA: the r smallest singular triplets of W removed, and ``s B diag(d) A`` added, d trained (Wang et al. 2024,
arXiv:2412.06071, sections 3.1 and 3.2).

Difference from PEFT: the triplets are removed in the record instead of in the weight, which is the same function of A,
B and d.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from veneer.contract.needed import needed_weight
from veneer.contract.parameters import Params, Shapes
from veneer.contract.settings import Settings
from veneer.contract.training import distances_from_orthonormal
from veneer.methods.variants import Variant, excluded
from veneer.ops.traced import is_tracing
from veneer.records.deltas import LinearDelta
from veneer.records.sites import LinearSite
from veneer.records.terms.pair import Pair

DIAGONAL = "lora_diag"


@dataclass(frozen=True)
class KasaConfig(Settings, Variant):
    """Settings of KaSA, with the names that PEFT gives them: the weights of the two penalties in training.

    ``beta`` weighs the squares of d, ``gamma`` the distance of A and B from orthogonal factors.
    """

    switch = "kasa_config"
    excludes = (*Variant.whole, "init_lora_weights")
    linear_only = reads_weight = inert = has_penalty = True
    ranks = 2

    beta: float = 1e-4
    gamma: float = 1e-3

    def problems(self) -> list[str]:
        given = {"beta": self.beta, "gamma": self.gamma}
        return [f"{name}={value!r} must be at least 0" for name, value in given.items() if value < 0]

    def refusals(self, config: Any) -> list[str]:
        return [] if config.inference_mode else excluded(config, ["lora_dropout"], f"{self.switch}: leave it out")

    def refusals_at(self, config: Any, sites: Sequence[LinearSite]) -> list[str]:
        return super().refusals_at(config, sites) + [
            f"r={config.rank(site)} at {site.name} takes off every singular triplet of a weight of {site.out_features} "
            f"x {site.in_features}, with kasa_config: give at most {least - 1}"
            for site in sites
            if config.rank(site) >= (least := min(site.out_features, site.in_features))
        ]

    def shapes(self, config: Any, site: LinearSite, shapes: Shapes) -> Shapes:
        return {DIAGONAL: (config.rank(site),)}

    def init(self, config: Any, site: LinearSite, params: Params, generator: torch.Generator | None) -> Params:
        return {DIAGONAL: torch.randn(config.rank(site), generator=generator)}

    def derived(self, config: Any, site: LinearSite) -> dict[str, Tensor]:
        """Return the pair whose product is the sum of the r smallest singular triplets of the weight, in float32."""
        r = config.rank(site)
        if is_tracing():  # of a plan, before weights have values
            return {"least_A": torch.zeros(r, site.in_features), "least_B": torch.zeros(site.out_features, r)}
        u, s, v = torch.linalg.svd(needed_weight(site, "KaSA").dense(torch.float32).detach(), full_matrices=False)
        return {"least_A": v[-r:].clone(), "least_B": (u[:, -r:] * s[-r:]).contiguous()}

    def lower(self, config: Any, site: LinearSite, params: Params, record: LinearDelta) -> LinearDelta:
        d = params[DIAGONAL]
        held = params if "least_A" in params else self.derived(config, site)
        a, b = (held[f"least_{factor}"].to(d.device, d.dtype) for factor in "AB")
        return LinearDelta(adds=(replace(cast(Pair, record.low_rank), core=d), Pair(a=a, b=-b)))

    def penalty(self, layers: Sequence[Params]) -> Tensor | None:
        parts = [self._penalty(params) for params in layers]
        return torch.stack(parts).sum() if parts and (self.beta or self.gamma) else None

    def _penalty(self, params: Params) -> Tensor:
        distances = distances_from_orthonormal(params["lora_A"], params["lora_B"])
        return self.beta * params[DIAGONAL].square().sum() + self.gamma * sum(distances)
