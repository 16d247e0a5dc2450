"""MiSS: ``W + Mᵀ S``, S adds up the blocks of the inputs (Kang and Yin 2024, arXiv:2409.15371, section 3; Bone's
successor).

Feature j of the inputs is added to entry ``j mod r``. So the update is a pair of rank r, whose A is the identity, tiled
over the inputs, and whose B is Mᵀ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from veneer.contract import LinearMethod, Params, Shapes
from veneer.contract.checks import Checks
from veneer.contract.family_targets import LOW_RANK
from veneer.contract.patterns import below_one
from veneer.contract.targets import FamilyTargets
from veneer.core.records import LinearDelta
from veneer.core.sites import LinearSite
from veneer.inits.uniform import kaiming_uniform


@dataclass(frozen=True, kw_only=True)
class MissConfig(LinearMethod):
    """MiSS in PEFT's fields.

    ``init_weights``: True starts with M zero, False with M random. "mini" trains ``mini_r`` columns of M, which are
    repeated over the outputs. "bat", an update that multiplies the weight, is not supported.
    """

    peft_type: ClassVar[str] = "MISS"
    headline: ClassVar[tuple[str, ...]] = ("r", "target_modules")
    outward: ClassVar[frozenset[str]] = frozenset({"miss_block"})
    family_targets: ClassVar[FamilyTargets] = LOW_RANK
    inert: ClassVar[frozenset[str]] = frozenset({"r", "mini_r", "miss_dropout", "init_weights", "bias"})

    r: int = 64
    miss_dropout: float = 0.0
    mini_r: int = 1
    init_weights: bool | Literal["bat", "mini"] = True
    bias: Literal["none", "all", "MiSS_only"] = "none"

    def problems(self) -> list[str]:
        found = super().problems() + below_one({"r": self.r, "mini_r": self.mini_r})
        if not 0 <= self.miss_dropout < 1:
            found.append(f"miss_dropout={self.miss_dropout!r} must lie in [0, 1)")
        if self.init_weights == "bat":
            found.append("init_weights='bat' is not supported: use True, False or 'mini'")
        return found

    @property
    def checks(self) -> Checks:
        return _Checks(self)

    @property
    def largest_rank(self) -> int:
        return self.r

    @property
    def dropout(self) -> float:
        return self.miss_dropout

    def shapes(self, site: LinearSite) -> Shapes:
        return {"miss_block": (self.r, self.mini_r if self.init_weights == "mini" else site.out_features)}

    def init(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        shape = self.shapes(site)["miss_block"]
        return {"miss_block": torch.zeros(shape) if self.init_weights else kaiming_uniform(shape, generator)}

    def lower(self, site: LinearSite, params: Params) -> LinearDelta:
        block = params["miss_block"]
        r, n_columns = block.shape
        a = torch.eye(r, dtype=block.dtype, device=block.device).repeat(1, -(-site.in_features // r))
        return LinearDelta.pair(a[:, : site.in_features], block.T.repeat(site.out_features // n_columns, 1))


@dataclass(frozen=True)
class _Checks(Checks):
    config: MissConfig

    def layers(self, sites: Sequence[LinearSite]) -> list[str]:
        """Blocks are within the inputs, and ``mini_r`` columns are repeated to all outputs."""
        r, mini_r = self.config.r, self.config.mini_r if self.config.init_weights == "mini" else 1
        narrow = [
            f"r={r} is above the {site.in_features} inputs of {site.name}: give r={site.in_features} or less"
            for site in sites
            if r > site.in_features
        ]
        return narrow + [
            f"mini_r={mini_r} does not divide the {site.out_features} outputs of {site.name}: give a divisor of "
            f"{site.out_features}"
            for site in sites
            if site.out_features % mini_r
        ]
