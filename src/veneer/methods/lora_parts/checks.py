"""Refusals of LoRA once the layers that it adapts are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from veneer.contract.checks import Checks
from veneer.contract.patterns import unmatched
from veneer.methods.lora_parts.settings import LoraSettings
from veneer.methods.variants import variants_of
from veneer.records.sites import LinearSite


@dataclass(frozen=True)
class LoraChecks(Checks):
    """Checks for ranks and settings that do not fit the layers."""

    config: LoraSettings

    def effect(self, names: Sequence[str], sites: Sequence[LinearSite]) -> list[str]:
        patterns = {"rank_pattern": self.config.rank_pattern, "alpha_pattern": self.config.alpha_pattern}
        return unmatched(patterns, names)

    def layers(self, sites: Sequence[LinearSite]) -> list[str]:
        """Return the problems of factors that do not fit. B consists of blocks at convolutions in groups, which starts
        from the weight do not give.
        """
        grouped = [site for site in sites if site.groups > 1]
        found = [
            f"r={self.config.rank(site)} at {site.name}, a convolution in {site.groups} groups: a rank that "
            f"{site.groups} divides is needed (rank_pattern sets it for single modules)"
            for site in grouped
            if self.config.rank(site) % site.groups
        ]
        found += [said for v in variants_of(self.config) for said in v.refusals_at(self.config, sites)]
        if grouped and self.config.packing.fixed:
            found.append(
                f"init_lora_weights={self.config.init_lora_weights!r} does not go with {grouped[0].name}, a "
                f"convolution in {grouped[0].groups} groups: leave it out, or list the layer in exclude_modules"
            )
        return found

    def advice(self, sites: Sequence[LinearSite]) -> list[str]:
        """Return a sentence if the rank is above both widths of every layer; below that it may be a choice, since
        heads are narrow.
        """
        ranks = [self.config.rank(site) for site in sites]
        if not ranks or min(ranks) <= max(max(site.in_features, site.out_features) for site in sites):
            return []
        largest = max(min(site.in_features, site.out_features) for site in sites)
        return [
            f"rank {min(ranks)} is above both widths of every layer adapted, and their updates have rank {largest} at "
            f"most: r={largest} reaches as many (a small one, such as 16, is usual)"
        ]

    def tied(self, tied: Sequence[LinearSite]) -> list[str]:
        values = {site.name: (self.config.rank(site), self.config.alpha(site)) for site in tied}
        if len(set(values.values())) <= 1:
            return []
        told = ", ".join(f"{name} r={r} and alpha={alpha}" for name, (r, alpha) in values.items())
        return [f"ensure_weight_tying=True, but rank_pattern and alpha_pattern give {told}: name all of them alike"]
