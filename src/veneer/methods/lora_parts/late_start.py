"""Starts of LoRA's factors that need the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from veneer.contract.late_start import LateStart
from veneer.methods.lora_parts.settings import LoraSettings
from veneer.records.sites import LinearSite


@dataclass(frozen=True, kw_only=True)
class LoraLateStart(LateStart):
    """Late start of A and B; ranks and alphas that differ by layer go into the patterns."""

    config: LoraSettings

    def rank(self, site: LinearSite) -> int:
        return self.config.rank(site)

    def scale(self, site: LinearSite) -> float:
        return self.config.scale(site)

    def with_ranks(
        self, sites: Mapping[str, LinearSite], ranks: Mapping[str, int], keep_scale: bool
    ) -> Mapping[str, object]:
        """Return the config's fields for the layers that are left, with ranks and alphas of their own.

        Layers are named by their whole paths if some are dropped.
        """
        config, left = self.config, [path for path in sites if ranks[path]]
        patterned = replace(config, rank_pattern={path: ranks[path] for path in left if ranks[path] != config.r})
        alphas = {}
        for path in left:
            before = config.alpha(sites[path])
            # what keeps the scale, whichever power of the rank a variant divides by
            grown = config.scale(sites[path]) / patterned.scale(sites[path]) if keep_scale else 1.0
            alphas[path] = before * grown if ranks[path] != config.rank(sites[path]) else before
        targets = config.target_modules if len(left) == len(sites) else left
        pattern = {path: alpha for path, alpha in alphas.items() if alpha != config.lora_alpha}
        return {"rank_pattern": patterned.rank_pattern, "alpha_pattern": pattern, "target_modules": targets}
