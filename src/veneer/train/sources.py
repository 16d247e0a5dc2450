"""Reads the sources of training rows in a recipe, each with its own reading settings."""

from __future__ import annotations

from veneer.data.sources import Source
from veneer.recipe.parts import DataPart
from veneer.recipe.readers import readers_of


def sources_of(part: DataPart) -> list[Source]:
    """Return ``data.train`` and the sources of ``data.more``. Raises ConfigError if a source has both
    weight and count.
    """
    own, *more = readers_of(part)
    found = [Source(name=part.train, reader=own)]
    for each, reader in zip(part.more, more, strict=True):
        found.append(Source(name=each.source, reader=reader, weight=each.weight, count=each.count))
    return found
