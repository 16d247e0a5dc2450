"""Seeds in a config."""

from __future__ import annotations

from collections.abc import Mapping

_LEAST, _BEYOND = -(2**63), 2**64  # torch.Generator's: signed or unsigned, of 64 bits


def no_seeds(values: Mapping[str, int]) -> list[str]:
    """Return a sentence for each value that torch does not accept as a seed."""
    return [
        f"{name}={value!r} must be a seed of torch: a whole number from -2**63 to 2**64 - 1"
        for name, value in values.items()
        if not _LEAST <= value < _BEYOND
    ]
