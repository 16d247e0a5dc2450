"""BD-LoRA: block-diagonal A or B, so that devices that share a layer exchange nothing for the update (Wang et al. 2025,
arXiv:2510.23346, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veneer.contract.parameters import Params, Shapes
from veneer.contract.patterns import below_one
from veneer.contract.settings import Settings
from veneer.methods.variants import Variant
from veneer.records.channel_groups import block_diagonal, diagonal_blocks
from veneer.records.sites import LinearSite


@dataclass(frozen=True)
class BdLoraConfig(Settings, Variant):
    """Settings of BD-LoRA, with the names that PEFT gives them.

    ``target_modules_bd_a`` and ``target_modules_bd_b`` name the layers whose A, or B, consists of ``nblocks`` blocks. A
    name matches a layer if the last part of the layer's path contains it. ``match_strict`` refuses adapted layers that
    neither of the two fields names.
    """

    switch = "use_bdlora"
    excludes = (*Variant.whole, "use_qalora", "kasa_config", "init_lora_weights")
    is_product = False
    linear_only = True

    target_modules_bd_a: Collection[str] | None = None
    target_modules_bd_b: Collection[str] | None = None
    nblocks: int = 1
    match_strict: bool = True

    def problems(self) -> list[str]:
        found = below_one({"nblocks": self.nblocks})
        both = sorted({*(self.target_modules_bd_a or ())} & {*(self.target_modules_bd_b or ())})
        return found + ([f"target_modules_bd_a and target_modules_bd_b share {both}: leave one out"] if both else [])

    def blocks(self, site: LinearSite) -> tuple[int, int]:
        """Return the number of blocks of A and of B in a layer; 1 means a full matrix."""
        of_a, of_b = self._named(site)
        return self.nblocks if of_a else 1, self.nblocks if of_b else 1

    def refusals_at(self, config: Any, sites: Sequence[LinearSite]) -> list[str]:
        found = [(site.name, self._problem(site, config.rank(site))) for site in sites]
        return super().refusals_at(config, sites) + [f"use_bdlora at {name}: {said}" for name, said in found if said]

    def _problem(self, site: LinearSite, r: int) -> str | None:
        """Return why a layer cannot have blocks at this rank, or None if it can."""
        of_a, of_b = self._named(site)
        if of_a and of_b:
            return "its name is in target_modules_bd_a and target_modules_bd_b: leave one out"
        if not (of_a or of_b):
            told = "neither target_modules_bd_a nor target_modules_bd_b names it. Set match_strict=False"
            return told if self.match_strict else None
        width, what = (site.in_features, "inputs of A") if of_a else (site.out_features, "outputs of B")
        told = f"nblocks={self.nblocks} does not divide r={r} and the {width} {what}: give a divisor of "
        return f"{told}{math.gcd(r, width)}" if r % self.nblocks or width % self.nblocks else None

    def _named(self, site: LinearSite) -> tuple[bool, bool]:
        """Return two flags: the first is True if the config names the layer for A, the second if it names the layer for
        B.
        """
        last, both = site.name.rpartition(".")[2], (self.target_modules_bd_a, self.target_modules_bd_b)
        of_a, of_b = (any(pattern in last for pattern in patterns or ()) for patterns in both)
        return of_a, of_b

    def width(self, config: Any, site: LinearSite) -> int:
        return self.blocks(site)[0]

    def shapes(self, config: Any, site: LinearSite, shapes: Shapes) -> Shapes:
        (rows, inputs, *window), (outputs, columns, *point) = shapes["lora_A"], shapes["lora_B"]
        n_a, n_b = self.blocks(site)
        return {"lora_A": (rows, inputs // n_a, *window), "lora_B": (outputs, columns // n_b, *point)}

    def init(self, config: Any, site: LinearSite, params: Params, generator: torch.Generator | None) -> Params:
        """Return the initial A and B. An A in blocks is uniform in ±√(6 / columns), as PEFT draws it. B has the
        diagonal blocks of plain LoRA's B.
        """
        n_a, n_b = self.blocks(site)
        a, columns = params["lora_A"], params["lora_A"].shape[1] // n_a
        if n_a > 1:
            bound = math.sqrt(6 / columns)
            a = torch.empty(len(a), columns).uniform_(-bound, bound, generator=generator)
        return {"lora_A": a, "lora_B": diagonal_blocks(params["lora_B"], n_b)}

    def factors(self, config: Any, site: LinearSite, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        n_a, n_b = self.blocks(site)
        return block_diagonal(a, n_a), block_diagonal(b, n_b)
