"""Homes of adapters (the few replicas that serve each), by rendezvous hashing with bounded load. No torch, no Ray."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from hashlib import blake2b

_BOUND = 1.5  # times the mean load, up to which a replica takes requests for the sake of an adapter
_FREE = 8  # requests at once that no replica minds: a step reads the weights once for all of them
_WINDOW = 256  # requests after which earlier ones count half


def ranking(name: str, replicas: Iterable[str]) -> list[str]:
    """Return the replicas ranked for a name by rendezvous hashing (Thaler and Ravishankar, 1998).

    The order of two replicas does not depend on the others: adding or removing a replica moves no name between
    the remaining ones.
    """
    return sorted(replicas, key=lambda replica: (_weight(name, replica), replica), reverse=True)


def order(name: str, loads: Mapping[str, int], n_homes: int) -> list[str]:
    """Return the replicas for a request, best first. ``loads``: number of requests in flight by replica.

    The homes of a name are the first ``n_homes`` replicas of its `ranking`; the least loaded home comes first. Replicas
    whose load has reached the `bound` come last, so that a busy home passes requests on to the next in the ranking.
    Bounded load is by Mirrokni, Thorup and Zadimoghaddam (2018). Difference from this source: a name may have several
    homes, and there is no bound while requests are few.
    """
    most = bound(loads)

    def place(ranked: tuple[int, str]) -> tuple[bool, bool, int, int]:
        rank, replica = ranked
        is_full, is_home = loads[replica] >= most, rank < n_homes
        return is_full, not is_home, loads[replica] if is_home or is_full else 0, rank

    return [replica for _, replica in sorted(enumerate(ranking(name, loads)), key=place)]


def bound(loads: Mapping[str, int]) -> int:
    """Return the number of requests in flight from which a replica counts as full. At least one replica is always below
    it.
    """
    return max(_FREE, math.ceil(_BOUND * (sum(loads.values()) + 1) / max(len(loads), 1)))


class Traffic:
    """Share of each adapter's name in recent requests, by counts that are halved every 256 requests."""

    def __init__(self) -> None:
        self._counts: dict[str, float] = {}
        self._total, self._n_since = 0.0, 0

    def add(self, name: str) -> None:
        """Count a request."""
        self._counts[name] = self._counts.get(name, 0.0) + 1.0
        self._total += 1.0
        self._n_since += 1
        if self._n_since == _WINDOW:
            self._n_since, self._total = 0, self._total / 2
            self._counts = {name: count / 2 for name, count in self._counts.items() if count >= 2}

    def share(self, name: str) -> float:
        """Return a name's share of recent requests, 0 to 1.

        The count is divided by the number of requests in a full window at least, so that the share is small after few
        requests.
        """
        return self._counts.get(name, 0.0) / max(self._total, _WINDOW)

    def n_homes(self, name: str, n_replicas: int) -> int:
        """Return the number of homes for a name, at most ``n_replicas``. It is the least number with which the name
        brings each home at most a quarter of a replica's mean load.
        """
        return min(n_replicas, max(1, math.ceil(4 * n_replicas * self.share(name))))


def _weight(name: str, replica: str) -> int:
    told = f"{replica}\0{name}".encode(errors="backslashreplace")  # names come from clients
    return int.from_bytes(blake2b(told, digest_size=8).digest(), "big")
