"""RoAd: ``R (W x + c)``, pairs of outputs rotated and scaled (Liao and Monz 2024, arXiv:2409.00119, eq. 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.contract import LinearMethod, Params, Shapes
from veneer.contract.checks import Checks
from veneer.contract.family_targets import LOW_RANK
from veneer.contract.peft_fields import PeftFields
from veneer.contract.targets import FamilyTargets
from veneer.records.deltas import LinearDelta
from veneer.records.sites import LinearSite
from veneer.records.terms.rotation import Rotation

_LARGEST_BLOCK = 128


@dataclass(frozen=True, slots=True)
class PairRotation(Rotation):
    """Map ``x ↦ along * x + across * J x``. J turns each pair (u, v) of features a quarter: (-v, u).

    Features k and k + group / 2 of each ``group`` are a pair.
    """

    along: Float[Tensor, " n"]
    across: Float[Tensor, " n"]
    group: int

    @property
    def width(self) -> int:
        return len(self.along)

    def apply(self, x: Tensor) -> Tensor:
        first, second = self._halves(x)
        quarter = torch.stack([-second, first], dim=-2).reshape(x.shape)
        return x * self.along + quarter * self.across

    def blocks_of_map(self) -> Tensor | None:
        if self.group > _LARGEST_BLOCK:
            return None
        (a, d), (b, c) = (x.view(-1, 2, self.group // 2).unbind(1) for x in (self.along, self.across))
        entries = torch.diag_embed(torch.stack([torch.stack([a, -b]), torch.stack([c, d])]))
        return entries.permute(2, 0, 3, 1, 4).reshape(-1, self.group, self.group)

    def transposed(self) -> PairRotation:
        swapped = torch.stack(self._halves(self.across)[::-1], dim=-2).reshape(-1)
        return PairRotation(self.along, -swapped, self.group)

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = x.reshape(*x.shape[:-1], -1, 2, self.group // 2).unbind(-2)
        return first, second


@dataclass(frozen=True, kw_only=True)
class RoadConfig(LinearMethod):
    """Settings of RoAd, with the names that PEFT gives them.

    Outputs k and k + group_size / 2 of each group are a pair. ``variant``: "road_1" has an angle and a scale for each
    pair, "road_2" for each output, "road_4" for each of the four entries of a pair's matrix.
    """

    peft_type: ClassVar[str] = "ROAD"
    headline: ClassVar[tuple[str, ...]] = ("variant", "target_modules")
    family_targets: ClassVar[FamilyTargets] = LOW_RANK
    peft_fields: ClassVar[PeftFields] = PeftFields(quiet=("exclude_modules", "layers_pattern", "layers_to_transform"))
    inert: ClassVar[frozenset[str]] = frozenset({"variant", "init_weights"})
    usual_learning_rate: ClassVar[float] = 5e-3

    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    group_size: int = 64
    init_weights: bool = True

    def problems(self) -> list[str]:
        found = super().problems()
        if self.group_size < 1 or self.group_size % 2:
            found.append(f"group_size={self.group_size!r} must be an even number of at least 2")
        return found

    @property
    def checks(self) -> Checks:
        return _Checks(self.group_size)

    def shapes(self, site: LinearSite) -> Shapes:
        n = {"road_1": site.out_features // 2, "road_2": site.out_features, "road_4": 2 * site.out_features}
        return dict.fromkeys(("road_theta", "road_alpha"), (n[self.variant],))

    def init(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        shape = self.shapes(site)["road_theta"]
        if self.init_weights:
            return {"road_theta": torch.zeros(shape), "road_alpha": torch.ones(shape)}
        theta, alpha = (0.5 * torch.randn(shape, generator=generator) for _ in range(2))
        return {"road_theta": theta, "road_alpha": 1 + alpha}

    def lower(self, site: LinearSite, params: Params) -> LinearDelta:
        (theta_1, alpha_1), (theta_2, alpha_2) = zip(
            *(self._by_column(params[name]) for name in ("road_theta", "road_alpha")), strict=True
        )
        rotation = PairRotation(alpha_1 * theta_1.cos(), alpha_2 * theta_2.sin(), self.group_size)
        return LinearDelta(output=rotation, bias=None if site.bias is None else rotation.apply(site.bias))

    def _by_column(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return two vectors with one number for each output k: the entries of column k of its pair's matrix, on and
        off the diagonal.
        """
        if self.variant == "road_4":
            first, second = values.view(-1, 2, self.group_size).unbind(1)
            return first.flatten(), second.flatten()
        if self.variant == "road_1":
            values = values.view(-1, self.group_size // 2).repeat_interleave(2, dim=0).flatten()
        return values, values


@dataclass(frozen=True)
class _Checks(Checks):
    group_size: int

    def layers(self, sites: Sequence[LinearSite]) -> list[str]:
        return [
            f"group_size={self.group_size} does not divide the {site.out_features} outputs of {site.name}: give an "
            f"even divisor of {site.out_features}"
            for site in sites
            if site.out_features % self.group_size
        ]
