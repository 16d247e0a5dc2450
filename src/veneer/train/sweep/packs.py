"""Packs of a sweep: members that train over one copy of the base, on one worker."""

from __future__ import annotations

from collections.abc import Mapping


def next_pack(waiting: Mapping[str, int], n_idle: int, n_places: int) -> list[str]:
    """Return the members of the next pack, those with the most stretches behind them first, otherwise in their order.

    ``waiting``: the stretches behind each member that waits. The pack has at most ``n_places`` members, and leaves
    enough of them for the other idle workers.
    """
    size = min(n_places, -(-len(waiting) // n_idle))
    return sorted(waiting, key=lambda name: -waiting[name])[:size]
