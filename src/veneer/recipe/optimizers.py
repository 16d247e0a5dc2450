"""Names of optimizers that restrict the rest of a recipe."""

from __future__ import annotations

from typing import Any

LAYERWISE = frozenset({"galore_adamw_layerwise", "galore_adamw_8bit_layerwise"})


def optim_name(optim: Any) -> str:
    """Return the name of an optimizer, given as a member of transformers' enumeration or as a string."""
    return str(getattr(optim, "value", optim))


def steps_in_backward(optim: Any) -> bool:
    """Return True if the optimizer of this name updates weights within the backward pass."""
    return optim_name(optim) in LAYERWISE
