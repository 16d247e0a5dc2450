"""Super-Tuning: ``W + S``, S sparse, trained where the weights are largest or smallest (arXiv:2607.09287).

With a rank it is the paper's Supra: ``W + S + (lora_alpha / r) B A``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from veneer.contract import LinearMethod, Params, Shapes
from veneer.contract.checks import Checks
from veneer.contract.family_targets import LOW_RANK
from veneer.contract.needed import needed_weight
from veneer.contract.packing import Packing
from veneer.contract.patterns import below_one
from veneer.contract.peft_fields import PeftFields
from veneer.contract.rates import no_rates
from veneer.contract.targets import FamilyTargets
from veneer.inits.uniform import kaiming_uniform
from veneer.ops.traced import is_tracing
from veneer.records.deltas import LinearDelta
from veneer.records.sites import LinearSite
from veneer.records.terms.pair import Pair
from veneer.records.terms.sparse import Sparse, place_problems

_MOST = 2**31  # weights of a layer that int32, PEFT's dtype of places, can number
_VALUES, _PLACES, _A, _B = (f"supertuning_{name}" for name in ("values", "indices", "lora_A", "lora_B"))


@dataclass(frozen=True, kw_only=True)
class SupertuningConfig(LinearMethod):
    """Settings of Super-Tuning, with the names that PEFT gives them.

    ``sparsity`` is the share of the weights that are not trained. ``select_top`` trains the weights with the largest
    magnitudes; False trains the smallest. ``r`` adds a low-rank pair, whose ``lora_alpha`` is 2 r if left out.
    ``lora_dropout`` acts on its input. ``init_weights`` starts at zero; False draws S and B at random.
    ``save_precomputed_indices=False`` leaves the places out of the file: they are found again in the base's weights.
    """

    peft_type: ClassVar[str] = "SUPERTUNING"
    headline: ClassVar[tuple[str, ...]] = ("sparsity", "select_top", "r", "target_modules")
    outward: ClassVar[frozenset[str]] = frozenset({_B})
    family_targets: ClassVar[FamilyTargets] = LOW_RANK
    peft_fields: ClassVar[PeftFields] = PeftFields(quiet=("exclude_modules", "layers_pattern", "layers_to_transform"))
    inert: ClassVar[frozenset[str]] = frozenset({"sparsity", "r", "lora_dropout", "init_weights"})

    sparsity: float = 0.99
    select_top: bool = True
    r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    init_weights: bool = True
    save_precomputed_indices: bool = True

    def problems(self) -> list[str]:
        found = super().problems() + ([] if self.r is None else below_one({"r": self.r}))
        found += no_rates(self, "sparsity", "lora_dropout")
        if self.r is None and self.lora_alpha is not None:
            found.append(f"lora_alpha={self.lora_alpha!r} is given without r: give the rank too, or leave it out")
        return found

    @property
    def checks(self) -> Checks:
        return _Checks(self)

    @property
    def reads_weight(self) -> bool:
        return not self.save_precomputed_indices

    @property
    def largest_rank(self) -> int:
        return self.r or 0

    @property
    def dropout(self) -> float:
        return self.lora_dropout if self.r else 0.0

    @property
    def packing(self) -> Packing:
        return _Places(fixed=(_PLACES,), whole={_PLACES: torch.int32}) if self.save_precomputed_indices else Packing()

    def count(self, site: LinearSite) -> int:
        """Return the number of weights that S changes in a layer."""
        return int(site.out_features * site.in_features * (1 - self.sparsity))

    def shapes(self, site: LinearSite) -> Shapes:
        n = self.count(site)
        found: Shapes = {_VALUES: (n,), _PLACES: (n,)} if self.save_precomputed_indices else {_VALUES: (n,)}
        return found if self.r is None else {**found, _A: (self.r, site.in_features), _B: (site.out_features, self.r)}

    def disk_names(self, site: LinearSite) -> dict[str, str]:
        return {name: f"{name}.weight" if name in (_A, _B) else name for name in self.shapes(site)}

    def init(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        shapes = self.shapes(site)
        n = shapes[_VALUES]
        found = {_VALUES: torch.zeros(n) if self.init_weights else torch.randn(n, generator=generator)}
        if self.save_precomputed_indices:
            found[_PLACES] = self._places(site)
        if self.r is not None:
            found[_A] = kaiming_uniform(shapes[_A], generator)
            found[_B] = torch.zeros(shapes[_B]) if self.init_weights else kaiming_uniform(shapes[_B], generator)
        return found

    def derived(self, site: LinearSite, params: Params) -> dict[str, Tensor]:
        if self.save_precomputed_indices:
            return {}
        return {_PLACES: self._places(site)}

    def lower(self, site: LinearSite, params: Params) -> LinearDelta:
        places = (params if _PLACES in params else self.derived(site, params))[_PLACES].long()
        values, size = params[_VALUES], (site.out_features, site.in_features)
        sparse = Sparse(values=values, places=places.to(values.device), size=size)
        if self.r is None:
            return LinearDelta(adds=(sparse,))
        alpha = 2 * self.r if self.lora_alpha is None else self.lora_alpha
        return LinearDelta(adds=(Pair(a=params[_A], b=params[_B], scale=alpha / self.r), sparse))

    def site_of(self, site: LinearSite, shapes: Mapping[str, tuple[int, ...]]) -> LinearSite | None:
        if _A not in shapes:
            return None
        return replace(site, in_features=shapes[_A][1], out_features=shapes[_B][0])

    def _places(self, site: LinearSite) -> Int[Tensor, " n"]:
        """Return the indices of the trained weights in torch's order, as in PEFT."""
        n = self.count(site)
        if is_tracing():  # of a plan, before weights have values
            return torch.arange(n, dtype=torch.int32)
        magnitudes = needed_weight(site, "Super-Tuning").dense().detach().abs().flatten()
        return magnitudes.topk(n, largest=self.select_top).indices.int().cpu()


@dataclass(frozen=True)
class _Places(Packing):
    """Packing that checks the file's places: they must lie within the weight, none of them twice."""

    def problems(self, site: LinearSite, params: Params) -> list[str]:
        size = site.out_features, site.in_features
        return place_problems(site.name, params[_PLACES].long(), size, _PLACES)


@dataclass(frozen=True)
class _Checks(Checks):
    config: SupertuningConfig

    def layers(self, sites: Sequence[LinearSite]) -> list[str]:
        """Return a problem for each layer that trains no weight, or that has more weights than int32 can number."""
        counts = {site.name: site.out_features * site.in_features for site in sites}
        found = [
            f"the places of the {n} weights of {name} are numbered in int32: leave out layers of more than {_MOST}"
            for name, n in counts.items()
            if n > _MOST
        ]
        return found + [
            f"sparsity={self.config.sparsity} leaves none of the {counts[site.name]} weights of {site.name} to train: "
            f"give at most {math.floor(1e6 * (1 - 1 / counts[site.name])) / 1e6}"
            for site in sites
            if self.config.count(site) == 0
        ]
