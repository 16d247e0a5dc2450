"""Checks of a config against the layers that it means. Each returns a list of problems; an empty one is assent."""

from __future__ import annotations

from collections.abc import Sequence

from veneer.core.sites import LinearSite


class Checks:
    """Nothing is refused; a method that refuses something overrides what it needs. Sites come as shapes."""

    def layers(self, sites: Sequence[LinearSite]) -> list[str]:
        """Layers that the method cannot act on with this config."""
        return []

    def tied(self, sites: Sequence[LinearSite]) -> list[str]:
        """Return the settings that differ between these layers, which must stay tied."""
        return []

    def effect(self, names: Sequence[str], sites: Sequence[LinearSite]) -> list[str]:
        """Return the settings of a new adapter that mean none of the modules adapted (by path), or that
        need larger layers.
        """
        return []
