"""Reading a table of embeddings: what it multiplies what it looks up by."""

from __future__ import annotations

from torch import nn

from veneer.model.blueprint.names import EMBEDDING_MULTIPLIERS


def own_multiplier(table: nn.Module) -> float:
    """Return the number that a table's module multiplies what it looks up by; 1 if it does not."""
    return next((float(getattr(table, name)) for name in EMBEDDING_MULTIPLIERS if hasattr(table, name)), 1.0)
