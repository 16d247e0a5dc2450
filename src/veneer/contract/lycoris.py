"""Fields of PEFT's methods from LyCORIS, and their checks (Yeh et al. 2024, arXiv:2309.14859)."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.contract.checks import Checks
from veneer.contract.family_targets import LOW_RANK
from veneer.contract.linear import LinearMethod
from veneer.contract.parameters import Params
from veneer.contract.patterns import PatternChecks, below_one, broken, first_match, values_of
from veneer.contract.rates import no_rates
from veneer.contract.targets import FamilyTargets
from veneer.records.deltas import LinearDelta
from veneer.records.sites import LinearSite
from veneer.records.terms.change import Change
from veneer.records.terms.in_groups import in_groups
from veneer.records.terms.pair import Pair

ROWS = "rows"
"""Factors of the update's rows (o,) in a training pass that drops some of them."""


@dataclass(frozen=True, kw_only=True)
class LycorisMethod(LinearMethod):
    """Rank and alpha with their patterns by module, and dropouts of the update in training.

    ``module_dropout`` is the probability that a layer drops its whole update. ``rank_dropout`` is the probability that
    it drops a row of the update. ``use_effective_conv2d``: the factors of a convolution whose kernel has several
    positions are a core (r, r, *window), and matrices for the channels in front of it and behind it.
    """

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
        return found + no_rates(self, "rank_dropout", "module_dropout")

    @property
    def _patterns(self) -> dict[str, Mapping[str, float]]:
        return {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}

    @property
    def checks(self) -> Checks:
        return PatternChecks(self._patterns)

    def rank(self, site: LinearSite) -> int:
        """Return the rank r at this site."""
        return first_match(self.rank_pattern, site.name, self.r)

    def scale(self, site: LinearSite) -> float:
        """Return the factor of the update at this site, alpha / r."""
        return first_match(self.alpha_pattern, site.name, self.alpha) / self.rank(site)

    @property
    def samples(self) -> tuple[LinearSite, ...]:
        """Example sites for each form of a file. If factors may have a core, the sites with a core are among them and
        have the most keys.
        """
        wide = LinearSite(name="", in_features=2, out_features=1, kind="convolution", window=(2,))
        return (*super().samples, *([wide] if self.use_effective_conv2d else []))

    @property
    def scales_kept_rows(self) -> bool:
        """Return True if ``rank_dropout`` divides the kept rows by their share."""
        return True

    def drawn(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return the dropout factors of the update's rows, or an empty dict if no row can be dropped.

        As many random numbers are drawn as in PEFT, in the same order.
        """
        if not (self.rank_dropout or self.module_dropout):
            return {}
        is_kept = torch.rand(1, generator=generator) > self.module_dropout
        if not (is_kept and self.rank_dropout):
            return {ROWS: is_kept.float().expand(site.out_features)}
        rows = (torch.rand(site.out_features, generator=generator) > self.rank_dropout).float()
        return {ROWS: rows / rows.mean().clamp_min(1 / len(rows)) if self.scales_kept_rows else rows}

    @abstractmethod
    def update(self, site: LinearSite, params: Params) -> Pair | Change:
        """Return the change of the weight (o, i), or of the blocks (o, i / groups) of a convolution in groups."""

    def lower(self, site: LinearSite, params: Params) -> LinearDelta:
        update = self.update(site, params)
        if ROWS in params:
            update = update.with_rows_times(params[ROWS])
        return LinearDelta(adds=(in_groups(update, site.groups),))

    def has_core(self, site: LinearSite) -> bool:
        """Return True if the factors at a site are those of ``use_effective_conv2d``."""
        return self.use_effective_conv2d and math.prod(site.window) > 1

    def core(self, site: LinearSite) -> tuple[int, ...]:
        """Return the shape (r, r, *window) of a core. PEFT's cores have a two-dimensional window for 1-D convolutions
        too.
        """
        r = self.rank(site)
        return (r, r, *site.window, 1) if len(site.window) == 1 else (r, r, *site.window)


def window_of(core: Sequence[int]) -> tuple[int, ...]:
    """Return the window of a convolution from the shape of its core: one-dimensional if the last axis is 1."""
    return tuple(core[2:-1] if len(core) == 4 and core[3] == 1 else core[2:])


def behind_core(core: Float[Tensor, "r r *window"], inner: Float[Tensor, "r channels"]) -> Float[Tensor, "r n"]:
    """Multiply a core by the matrix ``inner`` on its right. The columns are channels times window positions."""
    return torch.einsum("ij...,jc->ic...", core, inner).flatten(1)
