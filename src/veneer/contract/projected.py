"""Fields of methods that train vectors beside random matrices which all layers share: VeRA and PVeRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

from veneer.contract.family_targets import LOW_RANK
from veneer.contract.known import Known
from veneer.contract.linear import LinearMethod
from veneer.contract.patterns import below_one
from veneer.contract.rates import no_rates
from veneer.contract.seeds import no_seeds
from veneer.contract.targets import FamilyTargets
from veneer.records.sites import LinearSite


@dataclass(frozen=True, kw_only=True)
class ProjectedMethod(LinearMethod):
    """Random A and B from ``projection_prng_key``, as large as the largest layer needs, and the vectors' start.

    ``projection_size`` is (largest output, largest input) of the adapted layers.
    """

    rate: ClassVar[str]
    """Name of the field of the dropout."""
    headline: ClassVar[tuple[str, ...]] = ("r", "target_modules")
    family_targets: ClassVar[FamilyTargets] = LOW_RANK
    usual_learning_rate: ClassVar[float] = 5e-3
    inert: ClassVar[frozenset[str]] = frozenset(
        {"r", "save_projection", "d_initial", "fan_in_fan_out", "bias", "init_weights"}
        | {"projection_size"}  # follows from the layers
    )

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    init_weights: bool = True
    projection_size: tuple[int, int] | None = field(default=None, metadata={"on_disk": False})

    def problems(self) -> list[str]:
        found = super().problems() + below_one({"r": self.r})
        found += no_seeds({"projection_prng_key": self.projection_prng_key})
        found += no_rates(self, self.rate)
        if self.d_initial == 0:
            found.append(f"d_initial={self.d_initial!r} must be a finite number other than 0")
        return found

    @property
    def largest_rank(self) -> int:
        return self.r

    def for_sites(self, sites: Sequence[LinearSite], known: Known) -> Self:
        largest = max(site.out_features for site in sites), max(site.in_features for site in sites)
        return replace(self, projection_size=largest)
