"""BD-LoRA: A or B of a layer block-diagonal, so that devices that share the layer exchange nothing for the update (Wang
et al. 2025, arXiv:2510.23346, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.core.field_types import check, settings_of
from veneer.core.sites import LinearSite


@dataclass(frozen=True)
class BdLoraConfig:
    """Settings of BD-LoRA, in PEFT's fields.

    ``target_modules_bd_a`` and ``target_modules_bd_b`` name the layers whose A, or B, consists of ``nblocks`` blocks:
    those with one of these in the last name of their path. ``match_strict`` refuses layers that have neither.
    """

    target_modules_bd_a: Collection[str] | None = None
    target_modules_bd_b: Collection[str] | None = None
    nblocks: int = 1
    match_strict: bool = True

    def __post_init__(self) -> None:
        check(self, self._problems)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> BdLoraConfig:
        """Return the settings from a file's fields. Raises ConfigError for unknown ones."""
        return settings_of(cls, values)

    def _problems(self) -> list[str]:
        found = [f"nblocks={self.nblocks!r} must be a whole number of at least 1"] if self.nblocks < 1 else []
        both = sorted({*(self.target_modules_bd_a or ())} & {*(self.target_modules_bd_b or ())})
        return found + ([f"target_modules_bd_a and target_modules_bd_b share {both}: leave one out"] if both else [])

    def blocks(self, site: LinearSite) -> tuple[int, int]:
        """Return the counts of blocks of A and of B at a site; 1 is a whole matrix."""
        a, b = (self._names(site, patterns) for patterns in (self.target_modules_bd_a, self.target_modules_bd_b))
        return self.nblocks if a else 1, self.nblocks if b else 1

    def problems_at(self, site: LinearSite, r: int) -> list[str]:
        """Return the problems of blocks at a layer, of this rank."""
        named = [
            (factor, width)
            for factor, patterns, width in (
                ("A", self.target_modules_bd_a, site.in_features),
                ("B", self.target_modules_bd_b, site.out_features),
            )
            if self._names(site, patterns)
        ]
        where = f"use_bdlora at {site.name}"
        if len(named) == 2:
            return [f"{where}: its name is in target_modules_bd_a and target_modules_bd_b: leave one out"]
        if not named and self.match_strict:
            return [f"{where}: neither target_modules_bd_a nor target_modules_bd_b names it. Set match_strict=False"]
        return [
            f"{where}: nblocks={self.nblocks} does not divide r={r} and the {width} {'inputs' if factor == 'A' else ''}"
            f"{'outputs' if factor == 'B' else ''} of {factor}: give a divisor of {math.gcd(r, width)}"
            for factor, width in named
            if r % self.nblocks or width % self.nblocks
        ] + ([f"{where}: it is no linear layer. Leave it out of target_modules"] if site.kind != "linear" else [])

    def _names(self, site: LinearSite, patterns: Collection[str] | None) -> bool:
        return any(pattern in site.name.rpartition(".")[2] for pattern in patterns or ())


def drawn_blocks(shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
    """Return the blocks of A, uniform in ±√(6 / columns), as PEFT draws them."""
    bound = math.sqrt(6 / shape[1])
    return torch.empty(*shape).uniform_(-bound, bound, generator=generator)
