"""SHiRA: ``W + S``, S sparse, with r (i + o) trained numbers at fixed places (Bhardwaj et al. 2024, arXiv:2406.13175,
section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from veneer.contract import LinearMethod, Params, Shapes
from veneer.contract.checks import Checks
from veneer.contract.family_targets import LOW_RANK
from veneer.contract.packing import Packing
from veneer.contract.patterns import below_one
from veneer.contract.peft_fields import PeftFields
from veneer.contract.seeds import no_seeds
from veneer.contract.targets import FamilyTargets
from veneer.records.deltas import LinearDelta
from veneer.records.sites import LinearSite
from veneer.records.terms.sparse import Sparse, place_problems


@dataclass(frozen=True, kw_only=True)
class ShiraConfig(LinearMethod):
    """Settings of SHiRA, with the names that PEFT gives them.

    ``r``: as many numbers are trained as LoRA has at that rank. Their places are drawn, from ``random_seed`` if it is
    given, and stored in the file. ``init_weights`` starts the numbers at zero; False draws them from a normal
    distribution. A ``mask_type`` other than "random" is accepted in files, because they hold the places. Training with
    it is refused.
    """

    peft_type: ClassVar[str] = "SHIRA"
    headline: ClassVar[tuple[str, ...]] = ("r", "target_modules")
    family_targets: ClassVar[FamilyTargets] = {name: names for name, names in LOW_RANK.items() if name != "phi"}
    peft_fields: ClassVar[PeftFields] = PeftFields(quiet=("exclude_modules", "layers_pattern", "layers_to_transform"))
    inert: ClassVar[frozenset[str]] = frozenset({"r", "mask_type", "random_seed", "fan_in_fan_out", "init_weights"})

    r: int = 32
    mask_type: str = "random"
    random_seed: int | None = None
    fan_in_fan_out: bool = False
    init_weights: bool = True

    def problems(self) -> list[str]:
        found = super().problems() + below_one({"r": self.r})
        if self.mask_type != "random" and not self.inference_mode:
            found.append(f"mask_type={self.mask_type!r} is not supported in training: use 'random'")
        return found + no_seeds({} if self.random_seed is None else {"random_seed": self.random_seed})

    @property
    def checks(self) -> Checks:
        return _Checks(self.r)

    @property
    def packing(self) -> Packing:
        return _Places(fixed=("shira_indices",), whole={"shira_indices": torch.int32})

    def shapes(self, site: LinearSite) -> Shapes:
        n = self.r * (site.in_features + site.out_features)
        return {"shira_weight": (n,), "shira_indices": (2, n)}

    def init(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        n, (o, i) = self.shapes(site)["shira_weight"][0], (site.out_features, site.in_features)
        seed = self.random_seed
        drawing = generator if seed is None else torch.Generator().manual_seed(seed)
        places = torch.randperm(o * i, generator=drawing, device="cpu")[:n].sort().values
        values = torch.zeros(n) if self.init_weights else torch.randn(n, generator=generator)
        return {"shira_weight": values, "shira_indices": torch.stack([places // i, places % i]).int()}

    def lower(self, site: LinearSite, params: Params) -> LinearDelta:
        size = site.out_features, site.in_features
        rows, columns = params["shira_indices"].long()
        change = Sparse(values=params["shira_weight"], places=rows * size[1] + columns, size=size)
        return LinearDelta(adds=(change,))


@dataclass(frozen=True)
class _Places(Packing):
    """Packing that checks the file's places: they must lie within the weight, none of them twice."""

    def problems(self, site: LinearSite, params: Params) -> list[str]:
        o, i = size = site.out_features, site.in_features
        rows, columns = params["shira_indices"].long()
        inside = (rows >= 0) & (rows < o) & (columns >= 0) & (columns < i)
        return place_problems(site.name, torch.where(inside, rows * i + columns, -1), size, "shira_indices")


@dataclass(frozen=True)
class _Checks(Checks):
    r: int

    def layers(self, sites: Sequence[LinearSite]) -> list[str]:
        """Return a problem for each layer with fewer weights than numbers to train."""
        return [
            f"r={self.r} at {site.name} trains {n} numbers, and the layer has {o * i} weights: give at most "
            f"r={o * i // (o + i)}"
            for site in sites
            if (n := self.r * ((o := site.out_features) + (i := site.in_features))) > o * i
        ]
