"""QA-LoRA: A reads the means of groups of inputs, so that its product fits the zeros of a grouped quantization (Xu et
al. 2023, arXiv:2309.14717, section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from veneer.methods.variants import Variant
from veneer.records.sites import LinearSite


class QaLora(Variant):
    """QA-LoRA as a variant of LoRA, by its field ``use_qalora``."""

    switch = "use_qalora"
    excludes = (*Variant.whole, "kasa_config", "init_lora_weights")
    linear_only = True
    is_product = False

    def refusals_at(self, config: Any, sites: Sequence[LinearSite]) -> list[str]:
        size = config.qalora_group_size
        return super().refusals_at(config, sites) + [
            f"qalora_group_size={size} at {site.name}: give a divisor of its {site.in_features} inputs"
            for site in sites
            if site.in_features % size
        ]

    def read_site(self, config: Any, site: LinearSite) -> LinearSite:
        return replace(site, in_features=site.in_features // config.qalora_group_size)

    def width(self, config: Any, site: LinearSite) -> int:
        return int(config.qalora_group_size)

    def factors(self, config: Any, site: LinearSite, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        size = config.qalora_group_size  # A for single inputs has PEFT's scale of a mean of them
        return a.repeat_interleave(size, dim=1) * (site.in_features / size**2), b
