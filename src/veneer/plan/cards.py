"""Cards: GPUs by their data sheets, for plans of machines that are not this one. Nobody measured them here."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.core.nearest import nearest
from veneer.errors import ConfigError

EFFICIENCY = 0.5
"""Of a card's data sheet, what products of a training step commonly reach (0.4 to 0.6 is reported)."""


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU by its data sheet: bytes, bytes a second, dense bfloat16 FLOPs a second, and where that stands."""

    n_bytes: float
    bandwidth: float
    flops: float
    source: str

    @property
    def told(self) -> str:
        """Where its numbers come from, in words."""
        return f"data sheet, not measured: {self.source}"


CARDS = {
    "rtx-3090": Card(24e9, 936e9, 71e12, "NVIDIA, Ampere GA102 whitepaper (2020)"),
    "rtx-4090": Card(24e9, 1008e9, 165e12, "NVIDIA, Ada architecture whitepaper (2022)"),
    "a10g": Card(24e9, 600e9, 70e12, "NVIDIA, A10G data sheet"),
    "l4": Card(24e9, 300e9, 121e12, "NVIDIA, L4 data sheet"),
    "l40s": Card(48e9, 864e9, 362e12, "NVIDIA, L40S data sheet"),
    "a100-40gb": Card(40e9, 1555e9, 312e12, "NVIDIA, A100 data sheet"),
    "a100-80gb": Card(80e9, 2039e9, 312e12, "NVIDIA, A100 data sheet"),
    "h100-80gb": Card(80e9, 3350e9, 989e12, "NVIDIA, H100 SXM data sheet"),
    "h200": Card(141e9, 4800e9, 989e12, "NVIDIA, H200 data sheet"),
}


def card_of(name: str) -> Card:
    """A card by its name. Raises ConfigError, naming the nearest one."""
    if name.lower() not in CARDS:
        close = nearest(name.lower(), CARDS)
        raise ConfigError(
            f"no card {name!r}{'; did you mean ' + close[0] + '?' if close else ''}; there are {', '.join(CARDS)}"
        )
    return CARDS[name.lower()]
