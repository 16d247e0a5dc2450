"""Asynchronous successive halving: the members of a sweep that train beyond a rung.

Source: Li et al. 2018, arXiv 1810.05934, algorithm 2. Departs: the members are given, so the last arrival at a rung is
known. From then on the promoted share is rounded up, so that at least one member reaches its end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Standing:
    """Progress of a member: its loss at each rung that it has reached, and the number of stretches granted to it.

    A stretch ends at the next rung, the last one at the end of the run. ``over``: the run has ended by itself.
    """

    losses: tuple[float, ...] = ()
    granted: int = 1
    over: bool = False

    @property
    def trains(self) -> bool:
        """Return True if a stretch is left to train."""
        return not self.over and self.granted > len(self.losses)


def n_rungs(n_members: int, reduction: int) -> int:
    """Return the number of rungs after which fewer than ``reduction`` members are left; at least one for several."""
    found = 0
    while reduction ** (found + 1) <= n_members:
        found += 1
    return found or int(n_members > 1)


def divisor(stretch: int, n_rungs: int, reduction: int) -> int | None:
    """Return the number that divides a run's steps into those up to the end of a stretch; None for the last stretch."""
    return int(reduction ** (n_rungs - stretch)) if stretch < n_rungs else None


def promotions(standings: Mapping[str, Standing], n_rungs: int, reduction: int) -> list[str]:
    """Return the members that wait at a rung and are among its best, one in ``reduction``; equals in their order."""
    found: list[str] = []
    coming = set(standings)
    for rung in range(n_rungs):
        there = [name for name, each in standings.items() if len(each.losses) > rung]
        awaited = any(name not in there and not standings[name].over for name in coming)
        n_best = len(there) // reduction if awaited else -(-len(there) // reduction)
        best = sorted(there, key=lambda name: standings[name].losses[rung])[:n_best]
        found += [name for name in best if standings[name].granted == rung + 1]
        if not awaited:
            coming = {*best, *(name for name in there if standings[name].granted > rung + 1)}
    return found
