"""BD-LoRA: A or B of a layer block-diagonal, so that devices that share the layer exchange nothing for the update (Wang
et al. 2025, arXiv:2510.23346, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veneer.contract.parameters import Params, Shapes
from veneer.contract.settings import Settings
from veneer.methods.variants import Variant
from veneer.records.channel_groups import block_diagonal, diagonal_blocks
from veneer.records.sites import LinearSite


@dataclass(frozen=True)
class BdLoraConfig(Settings, Variant):
    """Settings of BD-LoRA, in PEFT's fields.

    ``target_modules_bd_a`` and ``target_modules_bd_b`` name the layers whose A, or B, consists of ``nblocks`` blocks:
    those with one of these in the last name of their path. ``match_strict`` refuses layers that have neither.
    """

    switch = "use_bdlora"
    excludes = (*Variant.whole, "use_qalora", "kasa_config")
    own_start = True
    is_product = False

    target_modules_bd_a: Collection[str] | None = None
    target_modules_bd_b: Collection[str] | None = None
    nblocks: int = 1
    match_strict: bool = True

    def problems(self) -> list[str]:
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

    def refusals_at(self, config: Any, sites: Sequence[LinearSite]) -> list[str]:
        return [said for site in sites for said in self.problems_at(site, config.rank(site))]

    def width(self, config: Any, site: LinearSite) -> int:
        return self.blocks(site)[0]

    def shapes(self, config: Any, site: LinearSite, shapes: Shapes) -> Shapes:
        (rows, inputs, *window), (outputs, columns, *point) = shapes["lora_A"], shapes["lora_B"]
        n_a, n_b = self.blocks(site)
        return {"lora_A": (rows, inputs // n_a, *window), "lora_B": (outputs, columns // n_b, *point)}

    def init(
        self, config: Any, site: LinearSite, params: Params, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """Return A in blocks, uniform in ±√(6 / columns) as PEFT draws them, and the blocks of B."""
        n_a, n_b = self.blocks(site)
        a, columns = params["lora_A"], params["lora_A"].shape[1] // n_a
        if n_a > 1:
            bound = math.sqrt(6 / columns)
            a = torch.empty(len(a), columns).uniform_(-bound, bound, generator=generator)
        return {"lora_A": a, "lora_B": diagonal_blocks(params["lora_B"], n_b)}

    def factors(self, config: Any, site: LinearSite, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        n_a, n_b = self.blocks(site)
        return block_diagonal(a, n_a), block_diagonal(b, n_b)
