"""Finds the factor with which an embedding table's module multiplies its output."""

from __future__ import annotations

from torch import nn

from veneer.model.blueprint.names import EMBEDDING_MULTIPLIERS


def own_multiplier(table: nn.Module) -> float:
    """Return the number by which a table's module multiplies its output, or 1 if it does not."""
    return next((float(getattr(table, name)) for name in EMBEDDING_MULTIPLIERS if hasattr(table, name)), 1.0)
