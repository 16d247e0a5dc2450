"""Fields of PEFT's methods from LyCORIS, and their checks (Yeh et al. 2024, arXiv:2309.14859)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from veneer.contract.checks import Checks, grouped
from veneer.contract.family_targets import LOW_RANK
from veneer.contract.linear import LinearMethod
from veneer.contract.patterns import PatternChecks, below_one, broken, first_match, values_of
from veneer.contract.targets import FamilyTargets
from veneer.core.sites import LinearSite

_DROPS = "drops parts of the update in training, which is not supported: set it to 0"


@dataclass(frozen=True, kw_only=True)
class LycorisMethod(LinearMethod):
    """Rank and alpha with their patterns by module. Dropouts of the update are read from files, not trained with."""

    headline: ClassVar[tuple[str, ...]] = ("r", "alpha", "target_modules")
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "convolution"})
    family_targets: ClassVar[FamilyTargets] = LOW_RANK
    inert: ClassVar[frozenset[str]] = frozenset(
        {"rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights"}
    )

    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def problems(self) -> list[str]:
        found = super().problems() + broken(self._patterns) + below_one(values_of(self, "r", "rank_pattern"))
        drops = {name: getattr(self, name) for name in ("rank_dropout", "module_dropout")}
        return found + [f"{name}={p!r} {_DROPS}" for name, p in drops.items() if p and not self.inference_mode]

    @property
    def _patterns(self) -> dict[str, Mapping[str, float]]:
        return {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}

    @property
    def checks(self) -> Checks:
        return _Checks(self._patterns, self.use_effective_conv2d)

    def rank(self, site: LinearSite) -> int:
        """Return the rank r at this site."""
        return first_match(self.rank_pattern, site.name, self.r)

    def scale(self, site: LinearSite) -> float:
        """Return the factor of the update at this site, alpha / r."""
        return first_match(self.alpha_pattern, site.name, self.alpha) / self.rank(site)


@dataclass(frozen=True)
class _Checks(PatternChecks):
    effective: bool

    def layers(self, sites: Sequence[LinearSite]) -> list[str]:
        wide = [site.name for site in sites if math.prod(site.window) > 1] if self.effective else []
        found = [
            f"use_effective_conv2d=True is not supported at {name}, a convolution: set it to False" for name in wide
        ]
        return found + grouped(sites)
