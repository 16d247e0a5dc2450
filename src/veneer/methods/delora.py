"""DeLoRA: ``W + B Ξ A diag(w)``, the columns of B and the rows of A normalized (Bini et al. 2025, arXiv:2503.18225,
eq. 8).

``Ξ = λ / (r |aⱼ| |bⱼ|)`` is diagonal, λ is trained, and w are the norms of the columns of W. The norm of the update is
therefore at most λ times that of w.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from veneer.contract import LinearMethod, Params, Shapes
from veneer.contract.checks import Checks
from veneer.contract.family_targets import LOW_RANK
from veneer.contract.packing import Packing
from veneer.contract.patterns import PatternChecks, below_one, broken, first_match, values_of
from veneer.contract.rates import no_rates
from veneer.contract.targets import FamilyTargets
from veneer.inits.uniform import kaiming_uniform
from veneer.records.deltas import LinearDelta
from veneer.records.sites import LinearSite

_LEAST_NORM = 1e-4  # PEFT's, of a column or row that is divided by its norm


@dataclass(frozen=True, kw_only=True)
class DeloraConfig(LinearMethod):
    """Settings of DeLoRA, with the names that PEFT gives them.

    ``delora_lambda`` is the value at which λ starts. ``init_weights`` starts with B zero; False makes both factors
    random. The norms w are kept in the file and never trained. ``module_dropout``: probability in training of zeroing
    an input of A.
    """

    peft_type: ClassVar[str] = "DELORA"
    headline: ClassVar[tuple[str, ...]] = ("r", "delora_lambda", "target_modules")
    outward: ClassVar[frozenset[str]] = frozenset({"delora_B"})
    family_targets: ClassVar[FamilyTargets] = LOW_RANK
    inert: ClassVar[frozenset[str]] = frozenset(
        {"r", "rank_pattern", "delora_lambda", "lambda_pattern", "module_dropout", "bias", "init_weights"}
    )

    r: int = 8
    delora_lambda: float = 15
    module_dropout: float = 0.0
    bias: Literal["none", "all", "delora_only"] = "none"
    init_weights: bool = True
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    lambda_pattern: Mapping[str, float] = field(default_factory=dict)

    def problems(self) -> list[str]:
        found = super().problems() + broken(self._patterns) + below_one(values_of(self, "r", "rank_pattern"))
        return found + no_rates(self, "module_dropout")

    @property
    def dropout(self) -> float:
        return self.module_dropout

    @property
    def _patterns(self) -> dict[str, Mapping[str, float]]:
        return {"rank_pattern": self.rank_pattern, "lambda_pattern": self.lambda_pattern}

    @property
    def checks(self) -> Checks:
        return PatternChecks(self._patterns)

    @property
    def largest_rank(self) -> int:
        return max((self.r, *self.rank_pattern.values()))

    @property
    def packing(self) -> Packing:
        return Packing(fixed=("delora_w_norm",))

    def shapes(self, site: LinearSite) -> Shapes:
        r, o, i = first_match(self.rank_pattern, site.name, self.r), site.out_features, site.in_features
        return {"delora_A": (r, i), "delora_B": (o, r), "delora_lambda": (1,), "delora_w_norm": (i,)}

    def init(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        shapes = self.shapes(site)
        a, b = (kaiming_uniform(shapes[name], generator) for name in ("delora_A", "delora_B"))
        return {
            "delora_A": a,
            "delora_B": torch.zeros_like(b) if self.init_weights else b,
            "delora_lambda": torch.tensor([float(first_match(self.lambda_pattern, site.name, self.delora_lambda))]),
            "delora_w_norm": _column_norms(site),
        }

    def lower(self, site: LinearSite, params: Params) -> LinearDelta:
        a, b = params["delora_A"], params["delora_B"]
        norms = a.norm(dim=1).clamp_min(_LEAST_NORM) * b.norm(dim=0).clamp_min(_LEAST_NORM)
        core = params["delora_lambda"] / (len(a) * norms)
        return LinearDelta.pair(a * params["delora_w_norm"], b, core=core)

    def site_of(self, site: LinearSite, shapes: Mapping[str, tuple[int, ...]]) -> LinearSite:
        return replace(site, in_features=shapes["delora_A"][1], out_features=shapes["delora_B"][0])


def _column_norms(site: LinearSite) -> Tensor:
    """Return the norms of the weight's columns, or ones when planning, before the weight is loaded."""
    if site.weight is None:
        return torch.ones(site.in_features)
    norms: Tensor = site.weight.dense(torch.float32).detach().norm(dim=0).to("cpu")
    return norms
