"""GPUs by their data sheets, for plans of other machines. Nothing was measured here."""

from __future__ import annotations

import re
from dataclasses import dataclass

from veneer.errors import ConfigError
from veneer.plain.nearest import nearest

EFFICIENCY = 0.5
"""Of a card's data sheet, what products of a training step commonly reach (0.4 to 0.6 is reported)."""


@dataclass(frozen=True, slots=True)
class Card:
    """GPU by its data sheet: bytes, bytes a second, dense bfloat16 FLOPs a second, and the source of these numbers."""

    n_bytes: float
    bandwidth: float
    flops: float
    source: str

    @property
    def told(self) -> str:
        """Source of the card's numbers, in words."""
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


def cards_named(name: str) -> list[str]:
    """Return the cards that match a name: a card's own name, or whole words of it, separate or joined.

    ``h100`` matches h100-80gb, and ``a100`` matches two cards; ``l4`` matches l4, but not l40s.
    """
    words = [word for word in re.split(r"[\s_-]+", name.lower()) if word not in ("", "nvidia", "geforce")]
    if "-".join(words) in CARDS:
        return ["-".join(words)]
    return [card for card in CARDS if "".join(words) in _written(card.split("-"))]


def card_problem(name: str) -> str | None:
    """Return a message if a name matches no card or several cards, and None if it matches one."""
    found = cards_named(name)
    if len(found) == 1:
        return None
    if found:
        return f"{name!r} means {' or '.join(found)}: give one of them"
    close = nearest(name.lower(), CARDS, n=1)
    return f"{name!r} must be one of {', '.join(CARDS)}" + (f"; the nearest is {close[0]!r}" if close else "")


def card_of(name: str) -> Card:
    """Return the card that a name matches. Raises ConfigError if there is none, or more than one."""
    problem = card_problem(name)
    if problem is not None:
        raise ConfigError(f"card {problem}")
    return CARDS[cards_named(name)[0]]


def _written(words: list[str]) -> set[str]:
    """Return the words, and each run of neighbouring words joined to one word. Runs that begin with a size are left
    out, because a size alone names no card.
    """
    starts = [i for i, word in enumerate(words) if not word.endswith("gb")]
    return {"".join(words[i:j]) for i in starts for j in range(i + 1, len(words) + 1)}
