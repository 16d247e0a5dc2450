"""Poly: ``W + B A / r``, where both factors are mixtures of skills, weighted by the task (Ponti et al. 2022,
arXiv:2202.13914).

If the widths are split, and each split mixes the skills in its own way, it is multi-head routing (Caccia et al. 2022,
arXiv:2211.03831).

Difference from PEFT: in a training pass, all rows of a task share one draw of random weights at a layer. PEFT draws for
each row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from veneer.contract import LinearMethod, Params, Shapes
from veneer.contract.checks import Checks
from veneer.contract.family_targets import LOW_RANK
from veneer.contract.patterns import below_one
from veneer.contract.peft_fields import PeftFields
from veneer.contract.targets import FamilyTargets
from veneer.contract.tasks import unnamed_task
from veneer.inits.uniform import kaiming_uniform
from veneer.records.deltas import LinearDelta
from veneer.records.sites import LinearSite

_A, _B, _LOGITS, _NOISE = "poly_lora_A", "poly_lora_B", "module_logits", "noise"
_LEAST = 1e-12  # PEFT adds it to the sum of a split's weights


@dataclass(frozen=True, kw_only=True)
class PolyConfig(LinearMethod):
    """Settings of Poly, with the names that PEFT gives them.

    Each of ``n_tasks`` tasks weights ``n_skills`` pairs of rank ``r``, separately in each of ``n_splits`` equal parts
    of the inputs and of the outputs. ``poly_type`` can only be "poly". ``init_weights`` starts B at zero; False draws
    all factors at random.
    """

    peft_type: ClassVar[str] = "POLY"
    headline: ClassVar[tuple[str, ...]] = ("r", "n_tasks", "n_skills", "n_splits", "target_modules")
    outward: ClassVar[frozenset[str]] = frozenset({_B})
    family_targets: ClassVar[FamilyTargets] = LOW_RANK
    peft_fields: ClassVar[PeftFields] = PeftFields(quiet=("layers_to_transform", "layers_pattern"))
    inert: ClassVar[frozenset[str]] = frozenset({"r", "init_weights", "poly_type", "n_tasks", "n_skills", "n_splits"})

    r: int = 8
    init_weights: bool = True
    poly_type: Literal["poly"] = "poly"
    n_tasks: int = 1
    n_skills: int = 4
    n_splits: int = 1

    def problems(self) -> list[str]:
        counts = {name: getattr(self, name) for name in ("r", "n_tasks", "n_skills", "n_splits")}
        return super().problems() + below_one(counts)

    @property
    def checks(self) -> Checks:
        return _Checks(self.n_splits)

    @property
    def largest_rank(self) -> int:
        return self.r

    def shapes(self, site: LinearSite) -> Shapes:
        n, skills, r = self.n_splits, self.n_skills, self.r
        return {
            _A: (n, skills, site.in_features // n, r),
            _B: (n, skills, r, site.out_features // n),
            _LOGITS: (self.n_tasks, n * skills),
        }

    def disk_names(self, site: LinearSite) -> dict[str, str]:
        return {_A: _A, _B: _B, _LOGITS: f"poly_router.{_LOGITS}"}

    def init(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        (n, skills, i, r), (_, _, _, o), logits = self.shapes(site).values()
        a = kaiming_uniform((n * skills * r, i), generator).view(n, skills, r, i)
        b = torch.zeros(n, skills, r, o)
        if not self.init_weights:
            b = kaiming_uniform((n * skills * o, r), generator).view(n, skills, o, r).mT.contiguous()
        return {
            _A: a.mT.contiguous(),
            _B: b,
            _LOGITS: torch.empty(logits).uniform_(-1e-3, 1e-3, generator=generator),
        }

    def of_task(self, params: Params, task: int) -> Params:
        return {**params, _LOGITS: params[_LOGITS][task : task + 1]}

    def drawn(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return logistic noise on the logits of one task, shared by all its rows.

        The sigmoid of the logits is then a relaxed Bernoulli variable of temperature 1 (Maddison et al. 2017,
        arXiv:1611.00712).
        """
        uniform = torch.rand(self.n_splits * self.n_skills, generator=generator)
        return {_NOISE: uniform.clamp(*_open_interval(uniform.dtype)).logit()}

    def lower(self, site: LinearSite, params: Params) -> LinearDelta:
        logits = params[_LOGITS]
        if len(logits) != 1:
            raise unnamed_task(self.peft_type, len(logits), "; of a folder, write one: veneer export as-lora --task N")
        if _NOISE in params:
            logits = logits + params[_NOISE]
        weights = logits.view(self.n_splits, self.n_skills).sigmoid()
        weights = weights / (weights.sum(dim=-1, keepdim=True) + _LEAST)
        a = torch.einsum("qs,qsir->qir", weights, params[_A]).flatten(0, 1)
        b = torch.einsum("qs,qsro->qor", weights, params[_B]).flatten(0, 1)
        return LinearDelta.pair(a.T, b, 1 / self.r)

    @property
    def samples(self) -> tuple[LinearSite, ...]:
        n = self.n_splits
        return tuple(replace(each, in_features=n, out_features=n) for each in super().samples)

    def site_of(self, site: LinearSite, shapes: Mapping[str, tuple[int, ...]]) -> LinearSite:
        (n, _, i, _), (_, _, _, o) = shapes[_A], shapes[_B]
        return replace(site, in_features=n * i, out_features=n * o)


def _open_interval(dtype: torch.dtype) -> tuple[float, float]:
    """Return the smallest and the largest uniform random number whose logit is finite."""
    least = torch.finfo(dtype).eps
    return least, 1 - least


@dataclass(frozen=True)
class _Checks(Checks):
    n_splits: int

    def layers(self, sites: Sequence[LinearSite]) -> list[str]:
        return [
            f"n_splits={self.n_splits} does not divide the {site.in_features} inputs and {site.out_features} outputs "
            f"of {site.name}: give a divisor of {math.gcd(site.in_features, site.out_features)}"
            for site in sites
            if math.gcd(site.in_features, site.out_features) % self.n_splits
        ]
