"""LoHa: ``W + (alpha / r) (B₁ A₁) ⊙ (B₂ A₂)``, an entrywise product of two low-rank ones (Hyeon-Woo et al. 2022,
arXiv:2108.06098, proposition 1).

It is a pair of rank r². A's rows are all products of a row of A₁ and one of A₂; B's columns likewise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from veneer.contract import Params, Shapes
from veneer.contract.lycoris import LycorisMethod
from veneer.core.records import LinearDelta
from veneer.core.sites import LinearSite
from veneer.inits.uniform import kaiming_uniform


@dataclass(frozen=True, kw_only=True)
class LoHaConfig(LycorisMethod):
    """LoHa in PEFT's fields. ``init_weights`` starts with one factor zero; False makes all random.

    ``rank_dropout`` and ``module_dropout`` are read from files; training with them is refused.
    ``use_effective_conv2d``, another form of the factors of convolutions, is refused if there are some.
    """

    peft_type: ClassVar[str] = "LOHA"
    outward: ClassVar[frozenset[str]] = frozenset({"hada_w1_a", "hada_w2_a"})
    inert: ClassVar[frozenset[str]] = frozenset({"r", "rank_pattern"})

    init_weights: bool = True

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
        return LinearDelta.pair(a, b, self.scale(site))

    def site_of(self, site: LinearSite, shapes: Mapping[str, tuple[int, ...]]) -> LinearSite:
        return replace(site, in_features=shapes["hada_w1_b"][1], out_features=shapes["hada_w1_a"][0])
