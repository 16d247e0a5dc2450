"""Seconds of a step from its work and a machine's rates: a roofline with a measured roof, or that of a data sheet.

seconds = sum over products of FLOPs / rate of that shape + attention + decoding + bytes moved / bandwidth + updates +
bytes that wait on disk / its rate + a cost for each op. Published rooflines land within 10 to 20% of one step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from veneer.plan.cards import EFFICIENCY, Card
from veneer.plan.machine import Rates
from veneer.plan.work import Work

LAUNCH = 1e-5
"""Seconds of a kernel's launch on a GPU."""
ROUGH = "measured while others used this machine, and so perhaps far too slow"
UPDATED_8BIT_BYTES = 16
"""Bytes that AdamW with moments in 8 bits moves for a value: it is read and written and its gradient read, in float32;
its two codes are read and written."""


@dataclass(frozen=True, slots=True)
class Seconds:
    """Seconds of one micro-batch, forward to update, by kind of work."""

    kinds: Mapping[str, float]
    source: str

    @property
    def step(self) -> float:
        """Sum over all kinds of work."""
        return sum(self.kinds.values())


def seconds_here(work: Work, rates: Rates) -> Seconds:
    """Return the seconds by the rates of this machine; missing rates are measured now and stored."""
    kinds = rates.parts(work) | {"elementwise": work.moved * rates.moved()}
    return Seconds(kinds, ROUGH if rates.rough else "measured on this machine")


def seconds_on(work: Work, card: Card) -> Seconds:
    """Return the seconds by a card's data sheet."""
    kinds = {
        "products": work.flops / (EFFICIENCY * card.flops),
        "elementwise": (work.moved + 0.5 * (work.decoded + work.decoded_tiles.total())) / card.bandwidth,
        "updates": (work.updated + UPDATED_8BIT_BYTES * work.updated_8bit) / card.bandwidth,
        "calls": work.n_ops * LAUNCH,
    }
    return Seconds(kinds, f"{card.told}, products at {EFFICIENCY:.0%}")
