"""MiSS: ``W + Mᵀ S``, where S adds up the blocks of the inputs (Kang and Yin 2024, arXiv:2409.15371, section 3;
successor of Bone).

Feature j of the inputs is added to entry ``j mod r``. The update is therefore a pair of rank r: A is the identity,
tiled over the inputs, and B is Mᵀ. The variant "bat" also multiplies blocks of the weight, and is not a small pair.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.contract import LinearMethod, Params, Shapes
from veneer.contract.checks import Checks
from veneer.contract.family_targets import LOW_RANK
from veneer.contract.needed import needed_weight
from veneer.contract.patterns import below_one
from veneer.contract.rates import no_rates
from veneer.contract.targets import FamilyTargets
from veneer.inits.uniform import kaiming_uniform
from veneer.records.deltas import LinearDelta
from veneer.records.sites import LinearSite
from veneer.records.terms.base import Base
from veneer.records.terms.change import Change


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockProduct(Change):
    """Change ``(Wₖⱼ + I) Mₖ`` of the block Wₖⱼ (r, r) of the weight, in row k and column j of the blocks."""

    blocks: Float[Tensor, "k r r"]
    base: Base

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.weight.shape

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype
        blocks = self.blocks.to(dtype)
        n, r, _ = blocks.shape
        products = self.base.weight.dense(dtype).reshape(n, -1, r) @ blocks
        return (products.view(n, r, -1, r) + blocks[:, :, None]).reshape(self.shape)


@dataclass(frozen=True, kw_only=True)
class MissConfig(LinearMethod):
    """Settings of MiSS, with the names that PEFT gives them.

    ``init_weights``: True starts M at zero; False draws M at random. "mini" trains ``mini_r`` columns of M, which are
    repeated over the outputs. "bat" starts M at zero and adds `BlockProduct`. ``miss_dropout``: probability in training
    of zeroing an input of the update.
    Difference from PEFT: PEFT ignores ``miss_dropout`` with "bat". Several adapters with "bat" on one layer are summed;
    PEFT lets each multiply the weight that the earlier ones have changed.
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
        return found + no_rates(self, "miss_dropout")

    @property
    def checks(self) -> Checks:
        return _Checks(self)

    @property
    def reads_weight(self) -> bool:
        return self.init_weights == "bat"

    @property
    def largest_rank(self) -> int:
        return 0 if self.init_weights == "bat" else self.r

    @property
    def dropout(self) -> float:
        return self.miss_dropout

    def shapes(self, site: LinearSite) -> Shapes:
        if self.init_weights == "bat":
            return {"miss_block": (site.out_features // self.r, self.r, self.r)}
        return {"miss_block": (self.r, self.mini_r if self.init_weights == "mini" else site.out_features)}

    def init(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        shape = self.shapes(site)["miss_block"]
        return {"miss_block": torch.zeros(shape) if self.init_weights else kaiming_uniform(shape, generator)}

    def lower(self, site: LinearSite, params: Params) -> LinearDelta:
        block = params["miss_block"]
        if self.init_weights == "bat":
            weight = needed_weight(site, "MiSS with init_weights='bat'")
            block = block.view_as(block)  # no parameter, whose record would be kept with this weight
            return LinearDelta(adds=(BlockProduct(blocks=block, base=Base(weight)),))
        r, n_columns = block.shape
        a = torch.eye(r, dtype=block.dtype, device=block.device).repeat(1, -(-site.in_features // r))
        return LinearDelta.pair(a[:, : site.in_features], block.T.repeat(site.out_features // n_columns, 1))


@dataclass(frozen=True)
class _Checks(Checks):
    config: MissConfig

    def layers(self, sites: Sequence[LinearSite]) -> list[str]:
        """Return a problem for each layer whose widths contradict ``r`` or ``mini_r``."""
        r, start = self.config.r, self.config.init_weights
        if start == "bat":
            return [
                f"r={r} does not divide the {site.in_features} inputs and {site.out_features} outputs of {site.name}, "
                "which init_weights='bat' needs: give a divisor of "
                f"{math.gcd(site.in_features, site.out_features)}"
                for site in sites
                if site.in_features % r or site.out_features % r
            ]
        mini_r = self.config.mini_r if start == "mini" else 1
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
