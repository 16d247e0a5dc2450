"""LoHa: ``W + (alpha / r) (B₁ A₁) ⊙ (B₂ A₂)``, an entrywise product of two low-rank ones (Hyeon-Woo et al. 2022,
arXiv:2108.06098, proposition 1).

It is a pair of rank r². A's rows are all products of a row of A₁ and one of A₂; B's columns likewise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from veneer.contract import LinearMethod, Params, Shapes
from veneer.contract.checks import Checks, grouped
from veneer.contract.family_targets import LOW_RANK
from veneer.contract.patterns import PatternChecks, broken, first_match
from veneer.contract.targets import Names
from veneer.core.records import LinearDelta
from veneer.core.sites import LinearSite
from veneer.inits.uniform import kaiming_uniform

_DROPS = "drops parts of the update in training, which is not supported: set it to 0"


@dataclass(frozen=True, kw_only=True)
class LoHaConfig(LinearMethod):
    """LoHa in PEFT's fields.

    ``rank_dropout`` and ``module_dropout`` are read from files; training with them is refused.
    ``use_effective_conv2d``, another form of the factors of convolutions, is refused if there are some.
    """

    peft_type: ClassVar[str] = "LOHA"
    headline: ClassVar[tuple[str, ...]] = ("r", "alpha", "target_modules")
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "convolution"})
    outward: ClassVar[frozenset[str]] = frozenset({"hada_w1_a", "hada_w2_a"})
    inert: ClassVar[frozenset[str]] = frozenset(
        {"r", "rank_pattern", "rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights"}
    )

    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    init_weights: bool = True
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def problems(self) -> list[str]:
        found = super().problems() + broken(self._patterns)
        ranks = {"r": self.r} | {f"rank_pattern[{key!r}]": r for key, r in self.rank_pattern.items()}
        found += [f"{name}={r!r} must be a whole number of at least 1" for name, r in ranks.items() if r < 1]
        drops = {name: getattr(self, name) for name in ("rank_dropout", "module_dropout")}
        return found + [f"{name}={p!r} {_DROPS}" for name, p in drops.items() if p and not self.inference_mode]

    @property
    def _patterns(self) -> dict[str, Mapping[str, float]]:
        return {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}

    @property
    def checks(self) -> Checks:
        return _Checks(self._patterns, self.use_effective_conv2d)

    @classmethod
    def fields_for(cls, model_type: str) -> Mapping[str, Names]:
        return {**super().fields_for(model_type), **LOW_RANK.get(model_type, {})}

    def rank(self, site: LinearSite) -> int:
        """Return the rank r at this site."""
        return first_match(self.rank_pattern, site.name, self.r)

    @property
    def largest_rank(self) -> int:
        return max((self.r, *self.rank_pattern.values())) ** 2

    def shapes(self, site: LinearSite) -> Shapes:
        r = self.rank(site)
        outer, inner = (site.out_features, r), (r, site.in_features)
        return {"hada_w1_a": outer, "hada_w1_b": inner, "hada_w2_a": outer, "hada_w2_b": inner}

    def init(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        start = {name: kaiming_uniform(shape, generator) for name, shape in self.shapes(site).items()}
        return start | ({"hada_w2_b": torch.zeros_like(start["hada_w2_b"])} if self.init_weights else {})

    def lower(self, site: LinearSite, params: Params) -> LinearDelta:
        b1, a1, b2, a2 = (params[name] for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"))
        a = (a1[:, None] * a2[None]).flatten(0, 1)
        b = (b1[:, :, None] * b2[:, None]).flatten(1)
        alpha = first_match(self.alpha_pattern, site.name, self.alpha)
        return LinearDelta.pair(a, b, alpha / self.rank(site))

    def site_of(self, site: LinearSite, shapes: Mapping[str, tuple[int, ...]]) -> LinearSite:
        return replace(site, in_features=shapes["hada_w1_b"][1], out_features=shapes["hada_w1_a"][0])


@dataclass(frozen=True)
class _Checks(PatternChecks):
    effective: bool

    def layers(self, sites: Sequence[LinearSite]) -> list[str]:
        wide = [site.name for site in sites if math.prod(site.window) > 1] if self.effective else []
        found = [
            f"use_effective_conv2d=True is not supported at {name}, a convolution: set it to False" for name in wide
        ]
        return found + grouped(sites)
