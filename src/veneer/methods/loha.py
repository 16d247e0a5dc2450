"""LoHa: ``W + (alpha / r) (B₁ A₁) ⊙ (B₂ A₂)``, an entrywise product of two low-rank ones (Hyeon-Woo et al. 2022,
arXiv:2108.06098, proposition 1).

It is a pair of rank r². A's rows are all products of a row of A₁ and one of A₂; B's columns likewise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from veneer.contract import Params, Shapes
from veneer.contract.lycoris import LycorisMethod, behind_core, window_of
from veneer.inits.uniform import kaiming_uniform
from veneer.records.sites import LinearSite
from veneer.records.terms.pair import Pair


@dataclass(frozen=True, kw_only=True)
class LoHaConfig(LycorisMethod):
    """Settings of LoHa, with the names that PEFT gives them.

    ``init_weights`` starts with one factor zero; False makes all random.

    ``rank_dropout`` is the probability that a row of the update is dropped; kept rows are divided by their share.
    """

    peft_type: ClassVar[str] = "LOHA"
    outward: ClassVar[frozenset[str]] = frozenset({"hada_w1_a", "hada_w2_a"})
    inert: ClassVar[frozenset[str]] = frozenset({"r", "rank_pattern"})

    init_weights: bool = True

    @property
    def largest_rank(self) -> int:
        return max((self.r, *self.rank_pattern.values())) ** 2

    def shapes(self, site: LinearSite) -> Shapes:
        r, n = self.rank(site), site.in_features // site.groups
        if self.has_core(site):
            outer, inner = (r, site.out_features), (r, n // math.prod(site.window))
            cores = {"hada_t1": self.core(site), "hada_t2": self.core(site)}
        else:
            outer, inner, cores = (site.out_features, r), (r, n), {}
        return {"hada_w1_a": outer, "hada_w1_b": inner, "hada_w2_a": outer, "hada_w2_b": inner, **cores}

    def init(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        start = {name: kaiming_uniform(shape, generator) for name, shape in self.shapes(site).items()}
        return start | ({"hada_w2_b": torch.zeros_like(start["hada_w2_b"])} if self.init_weights else {})

    def update(self, site: LinearSite, params: Params) -> Pair:
        (b1, a1), (b2, a2) = (_factors(params, n) for n in "12")
        a = (a1[:, None] * a2[None]).flatten(0, 1)
        b = (b1[:, :, None] * b2[:, None]).flatten(1)
        return Pair(a=a, b=b, scale=self.scale(site))

    def site_of(self, site: LinearSite, shapes: Mapping[str, tuple[int, ...]]) -> LinearSite:
        if "hada_t1" in shapes:
            window = window_of(shapes["hada_t1"])
            n = shapes["hada_w1_b"][1] * math.prod(window)
            return replace(site, in_features=n, out_features=shapes["hada_w1_a"][1], window=window)
        return replace(site, in_features=shapes["hada_w1_b"][1], out_features=shapes["hada_w1_a"][0])


def _factors(params: Params, n: str) -> tuple[Tensor, Tensor]:
    """Return B (o, r) and A (r, i) of one of the two products."""
    outer, inner = params[f"hada_w{n}_a"], params[f"hada_w{n}_b"]
    return (outer.T, behind_core(params[f"hada_t{n}"], inner)) if f"hada_t{n}" in params else (outer, inner)
