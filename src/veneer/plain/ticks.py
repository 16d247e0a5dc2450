"""Ticks of a logarithmic axis at exactly the plotted points, labelled if there is room."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Any

_ROOM = 0.02  # between two labels, as a share of the axis
_DIGIT = 0.013  # the width of a character


def ticks_at(axes: Any, values: Collection[float]) -> None:
    """Put a tick on the logarithmic x-axis of matplotlib's ``axes`` at each of the values, which are above zero.

    Each is labelled (``1.2M``) unless its label would overlap the one before it.
    """
    axes.set_xscale("log")
    places = sorted(set(values))
    low, high = (math.log(edge) for edge in axes.get_xlim())
    axes.set_xticks(places, _names(places, low, high))
    axes.set_xticks([], minor=True)


def short(value: float) -> str:
    """Return a number in about five characters at most: ``950``, ``1.2k``, ``135M``."""
    for unit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * unit:
            return f"{value / unit:.3g}{suffix}"
    return f"{value:.3g}"


def _names(places: list[float], low: float, high: float) -> Iterator[str]:
    """Yield the label of each tick of the axis, empty if it has no room beside its neighbours. The last tick always has
    a label.
    """
    at = {place: (math.log(place) - low) / (high - low) for place in places}
    half = {place: _DIGIT * len(short(place)) / 2 for place in places}
    free_from, last = -math.inf, places[-1]
    for place in places:
        left, right = at[place] - half[place], at[place] + half[place]
        is_last = place == last
        fits = left >= free_from + _ROOM and (is_last or right + _ROOM <= at[last] - half[last])
        free_from = right if fits else free_from
        yield short(place) if fits or is_last else ""
