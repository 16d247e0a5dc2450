"""VeLoRA: the gradient of A from inputs in compressed form, a number for each group of features (Miles et al. 2024,
arXiv:2405.17991, section 3).

A group x_g of g inputs is stored as ``x_g · e`` with a unit vector e that all groups share, and restored as ``s (x_g ·
e) e`` for the gradient. Forward passes, and all other gradients, are LoRA's.
Difference from PEFT: with ``init_type="batch_average"``, e is the mean of the current pass. The e in a file is kept for
PEFT, which writes that of its last pass. Layers that read the same x keep one full copy of it, even where A needs only
its compressed form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from veneer.contract.parameters import Params, Shapes
from veneer.contract.patterns import below_one
from veneer.contract.settings import Settings
from veneer.methods.variants import Variant
from veneer.records.deltas import LinearDelta
from veneer.records.sites import LinearSite
from veneer.records.terms.compressed import Compressed, unit
from veneer.records.terms.pair import Pair

EMBED = "lora_velora_embed"
IN_TRAINING = "velora_in_training"


@dataclass(frozen=True)
class VeloraConfig(Settings, Variant):
    """Settings of VeLoRA, with the names that PEFT gives them.

    ``num_groups`` groups of features are compressed, and ``scale`` is s. ``init_type`` names e: the mean of each pass
    ("batch_average") or a random vector ("random"). "batch_average_once" is read from files. Training with it is
    refused, since e would be that of a first batch.
    """

    switch = "velora_config"
    excludes = (*Variant.whole, "use_qalora", "use_bdlora", "kasa_config", "monteclora_config")
    fixed = (EMBED,)
    linear_only = inert = True

    num_groups: int = 64
    scale: float = 1.0
    init_type: Literal["batch_average", "batch_average_once", "random"] = "batch_average"

    def problems(self) -> list[str]:
        found = below_one({"num_groups": self.num_groups})
        return found + ([] if self.scale > 0 else [f"scale={self.scale!r} must be above 0"])

    def width_of_group(self, site: LinearSite) -> int:
        """Return the number of features in a group. If the last group has fewer, zeros fill it up."""
        return -(-site.in_features // self.num_groups)

    def refusals(self, config: Any) -> list[str]:
        if self.init_type != "batch_average_once" or config.inference_mode:
            return []
        return [
            "velora_config.init_type='batch_average_once' keeps the mean of a first batch, which is not supported in "
            "training: give 'batch_average' or 'random'"
        ]

    def shapes(self, config: Any, site: LinearSite, shapes: Shapes) -> Shapes:
        return {EMBED: (self.width_of_group(site),)}

    def init(self, config: Any, site: LinearSite, params: Params, generator: torch.Generator | None) -> Params:
        """Return the initial e: a random unit vector, or zeros if e is the mean of each pass."""
        width = self.width_of_group(site)
        is_random = self.init_type == "random"
        return {EMBED: unit(torch.randn(width, generator=generator)) if is_random else torch.zeros(width)}

    def drawn(self, config: Any, site: LinearSite, generator: torch.Generator | None) -> dict[str, Tensor]:
        return {IN_TRAINING: torch.ones(())}

    def lower(self, config: Any, site: LinearSite, params: Params, record: LinearDelta) -> LinearDelta:
        if IN_TRAINING not in params:
            return record
        pair = cast(Pair, record.low_rank)
        change = Compressed(
            a=pair.a,
            b=pair.b,
            embed=params[EMBED],
            times=pair.scale,
            groups=self.num_groups,
            scale=self.scale,
            is_mean=self.init_type != "random",
        )
        return LinearDelta(adds=(change,))
