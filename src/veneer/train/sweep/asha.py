"""Asynchronous successive halving: chooses the members of a sweep that train beyond a rung, which is a step to compare
at.

Source: Li et al. 2018, arXiv 1810.05934, algorithm 2. It differs from the source: the members are known from the start,
and so is the last arrival at a rung. From then on the promoted share is rounded up, so that at least one member trains
to its end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Standing:
    """Progress of a member of a sweep. ``losses``: its loss at each rung that it has reached. ``granted``: the number
    of stretches that it may train.

    A stretch ends at the next rung, and the last one at the end of the run. ``over``: the run has ended by itself.
    """

    losses: tuple[float, ...] = ()
    granted: int = 1
    over: bool = False

    @property
    def trains(self) -> bool:
        """Return True if the member may train a further stretch."""
        return not self.over and self.granted > len(self.losses)


def n_rungs(n_members: int, reduction: int) -> int:
    """Return the number of rungs of a sweep: after the last one, fewer than ``reduction`` members are left. It is at
    least one if there are several members.
    """
    found = 0
    while reduction ** (found + 1) <= n_members:
        found += 1
    return found or int(n_members > 1)


def divisor(stretch: int, n_rungs: int, reduction: int) -> int | None:
    """Return d so that the stretch ends after 1/d of a run's steps, or None for the last stretch."""
    return int(reduction ** (n_rungs - stretch)) if stretch < n_rungs else None


def promotions(standings: Mapping[str, Standing], n_rungs: int, reduction: int) -> list[str]:
    """Return the members that wait at a rung and may train further: at each rung the best one in ``reduction``. Among
    members of equal loss, the first ones count as better.
    """
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
