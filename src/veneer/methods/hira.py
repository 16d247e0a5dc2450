"""HiRA: ``W + W ⊙ (B A)``, a low-rank pair that multiplies the weight entrywise (Huang et al. 2025, ICLR,
openreview.net/forum?id=TwJrTz9cRS, eq. 4).

The change has full rank, and depends on the weight of its base.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from veneer.contract import LinearMethod, Params, Shapes
from veneer.contract.checks import Checks, GroupChecks
from veneer.contract.family_targets import LOW_RANK
from veneer.contract.needed import needed_weight
from veneer.contract.patterns import below_one
from veneer.contract.peft_fields import PeftFields
from veneer.contract.rates import no_rates
from veneer.contract.targets import FamilyTargets
from veneer.inits.uniform import kaiming_uniform
from veneer.records.deltas import LinearDelta
from veneer.records.sites import LinearSite
from veneer.records.terms.base import Base
from veneer.records.terms.hadamard import Hadamard


@dataclass(frozen=True, kw_only=True)
class HiraConfig(LinearMethod):
    """Settings of HiRA, with the names that PEFT gives them.

    ``init_weights``: True starts B at zero (in embeddings, A). "gaussian" draws A from a normal distribution. False
    draws both, so that the start changes the model. ``hira_dropout``: probability in training of zeroing an input of
    the change; it does not act on embeddings.
    """

    peft_type: ClassVar[str] = "HIRA"
    headline: ClassVar[tuple[str, ...]] = ("r", "target_modules")
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "embedding", "convolution"})
    outward: ClassVar[frozenset[str]] = frozenset({"hira_B"})
    family_targets: ClassVar[FamilyTargets] = LOW_RANK
    peft_fields: ClassVar[PeftFields] = PeftFields(neutral={"rank_pattern": {}})  # which PEFT itself leaves unread
    inert: ClassVar[frozenset[str]] = frozenset({"r", "hira_dropout", "fan_in_fan_out", "init_weights"})

    r: int = 32
    hira_dropout: float = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool | Literal["gaussian"] | None = True

    def problems(self) -> list[str]:
        return super().problems() + below_one({"r": self.r}) + no_rates(self, "hira_dropout")

    @property
    def dropout(self) -> float:
        return self.hira_dropout

    @property
    def checks(self) -> Checks:
        return GroupChecks()

    @property
    def reads_weight(self) -> bool:
        return True

    def shapes(self, site: LinearSite) -> Shapes:
        r, channels, point = self.r, site.in_features // math.prod(site.window), (1,) * len(site.window)
        return {"hira_A": (r, channels, *site.window), "hira_B": (site.out_features, r, *point)}

    def init(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        shapes = self.shapes(site)
        if not self.init_weights:
            return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        zeros = {name: torch.zeros(shape) for name, shape in shapes.items()}
        if site.kind == "embedding":
            return zeros | {"hira_B": torch.randn(shapes["hira_B"], generator=generator)}
        if self.init_weights == "gaussian" and site.kind == "linear":
            return zeros | {"hira_A": torch.randn(shapes["hira_A"], generator=generator) / self.r}
        return zeros | {"hira_A": kaiming_uniform((self.r, site.in_features), generator).view(shapes["hira_A"])}

    def disk_names(self, site: LinearSite) -> dict[str, str]:
        infix = "_embedding" if site.kind == "embedding" else ""
        return {f"hira_{factor}": f"hira{infix}_{factor}" for factor in "AB"}

    def lower(self, site: LinearSite, params: Params) -> LinearDelta:
        a, b = (params[name] for name in ("hira_A", "hira_B"))
        a, b = a.view(len(a), -1), b.view(len(b), -1)  # no parameters, whose record would be kept with this weight
        return LinearDelta(adds=(Hadamard(a=a, b=b, base=Base(needed_weight(site, "HiRA"))),))
