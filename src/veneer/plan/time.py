"""Seconds of a step from its work and a machine's rates: a roofline with a measured roof, or that of a data sheet.

seconds = sum over products of FLOPs / rate of that shape + attention + decoding + bytes moved / bandwidth + updates +
bytes that wait on disk / its rate + a cost for each op. Published rooflines land within 10 to 20% of one step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from veneer.plan.cards import EFFICIENCY, Card
from veneer.plan.machine import Rates
from veneer.plan.observed import Observed
from veneer.plan.work import Work

LAUNCH = 1e-5
"""Seconds of a kernel's launch on a GPU."""
ROUGH = "measured while others used this machine"
STEPS = "steps of earlier runs"
WIDE = 0.8
"""A range is told if its low end is below so much of its high end."""
UPDATED_8BIT_BYTES = 16
"""Bytes that AdamW with moments in 8 bits moves for a value: it is read and written and its gradient read, in float32;
its two codes are read and written."""


@dataclass(frozen=True, slots=True)
class Seconds:
    """Seconds of one micro-batch, forward to update, by kind of work; ``between``: their range, if it is wide."""

    kinds: Mapping[str, float]
    source: str
    between: tuple[float, float] | None = None

    @property
    def step(self) -> float:
        """Sum over all kinds of work."""
        return sum(self.kinds.values())


def seconds_here(work: Work, rates: Rates) -> Seconds:
    """Return the seconds of some work by the rates of this machine. Missing rates are measured now and stored.

    Raises UnmeasuredError if a rate is missing and may not be measured.
    """
    kinds = _kinds(work, rates)
    found = Seconds(kinds, ROUGH if rates.rough else "measured on this machine")
    least = sum(_kinds(work, rates.at_best()).values())
    return replace(found, between=(least, found.step)) if least < WIDE * found.step else found


def seconds_by(run: Observed, tokens: float | None) -> Seconds:
    """Return the seconds of a micro-batch of ``tokens`` tokens, from an earlier run of the same settings.

    If ``tokens`` is None, the micro-batch has as many as the run's.
    """
    low, middle, high = run.of_tokens(tokens)
    between = (low, high) if low < WIDE * high else None
    return Seconds({STEPS: middle}, "as an earlier run of these settings took", between)


def seconds_like(flops: float, rates: tuple[float, float]) -> Seconds:
    """Return the seconds of ``flops`` FLOPs, as a range.

    ``rates`` are the least and the most FLOPs a second of earlier runs.
    """
    low, high = flops / rates[1], flops / rates[0]
    return Seconds({STEPS: math.sqrt(low * high)}, "by earlier runs of other settings", (low, high))


def _kinds(work: Work, rates: Rates) -> dict[str, float]:
    return rates.parts(work) | {"elementwise": work.moved * rates.moved()}


def seconds_on(work: Work, card: Card) -> Seconds:
    """Return the seconds of some work by a card's data sheet."""
    kinds = {
        "products": work.flops / (EFFICIENCY * card.flops),
        "elementwise": (work.moved + 0.5 * (work.decoded + work.decoded_tiles.total())) / card.bandwidth,
        "updates": (work.updated + UPDATED_8BIT_BYTES * work.updated_8bit) / card.bandwidth,
        "calls": work.n_ops * LAUNCH,
    }
    return Seconds(kinds, f"{card.told}, products at {EFFICIENCY:.0%}")
