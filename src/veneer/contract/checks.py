"""Checks of a config against the layers that it targets. Each returns a list of problems, empty if all is well."""

from __future__ import annotations

from collections.abc import Sequence

from veneer.records.sites import LinearSite


class Checks:
    """Checks of a method's config; these accept everything, and a method overrides those that can fail. Layers are
    described by their shapes.
    """

    def layers(self, sites: Sequence[LinearSite]) -> list[str]:
        """Return a problem for each layer that the method cannot act on with this config."""
        return []

    def tied(self, sites: Sequence[LinearSite]) -> list[str]:
        """Return a problem for each setting that differs between these layers, whose weights must stay tied."""
        return []

    def effect(self, names: Sequence[str], sites: Sequence[LinearSite]) -> list[str]:
        """Return the settings of a new adapter that have no effect, because they match none of the adapted modules
        ``names``.
        """
        return []

    def advice(self, sites: Sequence[LinearSite]) -> list[str]:
        """Return a sentence for each setting of a new adapter that is accepted but is probably a mistake."""
        return []


class GroupChecks(Checks):
    """Checks of a method that cannot change convolutions in groups."""

    def layers(self, sites: Sequence[LinearSite]) -> list[str]:
        return grouped(sites)


def grouped(sites: Sequence[LinearSite]) -> list[str]:
    """Return a sentence for each convolution in groups, for a method whose update mixes all channels."""
    return [
        f"{site.name} is a convolution in {site.groups} groups, which this method cannot change: "
        "list it in exclude_modules"
        for site in sites
        if site.groups > 1
    ]
