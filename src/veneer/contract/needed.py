"""Gets the frozen weight on which a method's update depends."""

from __future__ import annotations

from veneer.errors import ConfigError
from veneer.records.frozen import FrozenWeight
from veneer.records.sites import LinearSite


def needed_weight(site: LinearSite, who: str) -> FrozenWeight:
    """Return the frozen weight of a site.

    ``who`` is the method that needs the weight. Raises ConfigError if the weight is not loaded.
    """
    if site.weight is None:
        raise ConfigError(missing_weight(site, who))
    return site.weight


def missing_weight(site: LinearSite, who: str) -> str:
    """Return the message for the method ``who`` in a layer whose frozen weight is not loaded."""
    return f"{who} at {site.name} needs the frozen weight: load the base model before attaching"
