"""What a method refuses of the layers that its config means. Each answer is a list of sentences; none is assent."""

from __future__ import annotations

from collections.abc import Sequence

from veneer.core.sites import LinearSite


class Checks:
    """Nothing is refused; a method that refuses something overrides what it needs. Sites come as shapes."""

    def layers(self, sites: Sequence[LinearSite]) -> list[str]:
        """Layers that the method cannot act on with this config."""
        return []

    def tied(self, sites: Sequence[LinearSite]) -> list[str]:
        """What in the config is not the same for these layers, which are to stay one."""
        return []

    def effect(self, names: Sequence[str], sites: Sequence[LinearSite]) -> list[str]:
        """What in the config of a new adapter means none of the modules adapted (by path), or no layer is large enough
        for.
        """
        return []
