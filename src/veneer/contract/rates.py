"""Shares in a config, such as the probabilities of dropouts in training."""

from __future__ import annotations


def no_rates(config: object, *fields: str) -> list[str]:
    """Return a sentence for each of these fields that is not a share below 1."""
    values = {name: getattr(config, name) for name in fields}
    return [f"{name}={value!r} must lie in [0, 1)" for name, value in values.items() if not 0 <= value < 1]
