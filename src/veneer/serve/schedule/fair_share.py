"""Clients and the service they received: virtual token counters (Sheng et al. 2024, arXiv 2401.00588). No torch."""

from __future__ import annotations

import itertools
from collections.abc import Hashable
from dataclasses import dataclass

from veneer.serve.schedule.lazy_heap import LazyHeap

READ, DRAWN = 1, 2  # weights of a token of a prompt and of one of an answer, as in the paper


@dataclass(eq=False, slots=True)
class Client:
    """Counter of a client: the weighted tokens that it has received, divided by the client's own ``weight``.

    ``n_waiting`` and ``n_running`` count the client's requests that wait, and that are in the batch.
    """

    name: Hashable
    number: int
    weight: float = 1.0
    counter: float = 0
    n_waiting: int = 0
    n_running: int = 0


class FairShare:
    """Virtual token counters; the client with the least is admitted next (Algorithm 2 of the paper).

    A client gains nothing by waiting without requests: when it sends one, its counter is raised to the least counter of
    the clients that wait, or to that of the last one that waited. A client's service is the number of its received
    tokens divided by its weight. The services of two clients that wait all the time differ by at most 2 m / w. Here m
    is the larger of the longest prompt and ``DRAWN`` times the tokens in a batch, and w the least weight. A client
    without requests is forgotten if its counter would be raised anyway.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, Client] = {}
        self._numbers = itertools.count()
        self._waiting: LazyHeap[Client] = LazyHeap(lambda c: (c.counter, c.number) if c.n_waiting else None)
        self._gone: LazyHeap[Client] = LazyHeap(lambda c: None if c.n_waiting + c.n_running else (c.counter, c.number))
        self._last = 0.0

    def __len__(self) -> int:
        return len(self._known)

    def __getitem__(self, name: Hashable) -> Client:
        """Return a client that has requests here."""
        return self._known[name]

    def enter(self, name: Hashable, weight: float = 1.0) -> Client:
        """Count a new waiting request. Return its client, whose weight is ``weight`` from now on."""
        floor = self._floor()
        self._forget(floor)
        client = self._known.get(name)
        if client is None:
            client = self._known[name] = Client(name, next(self._numbers))
        client.weight = weight
        if not client.n_waiting:
            client.counter = max(client.counter, floor)
        self._wait(client, 1)
        return client

    def leave(self, client: Client) -> None:
        """Remove a request that waited."""
        self._wait(client, -1)
        self._gone.put(client)

    def begin(self, client: Client, n_tokens: int) -> None:
        """Move a waiting request into the batch, and count the tokens of its prompt that are to be read."""
        client.n_running += 1
        client.counter += READ * n_tokens / client.weight
        self._wait(client, -1)

    def back(self, client: Client) -> None:
        """Move a request from the batch back to the waiting ones. The client's counter is not raised."""
        client.n_running -= 1
        self._wait(client, 1)

    def draw(self, client: Client) -> None:
        """Count a drawn token."""
        client.counter += DRAWN / client.weight

    def end(self, client: Client) -> None:
        """Remove a request of the batch."""
        client.n_running -= 1
        self._gone.put(client)

    def _wait(self, client: Client, n: int) -> None:
        client.n_waiting += n
        if client.n_waiting:
            self._waiting.put(client)
        else:
            self._last = client.counter

    def _floor(self) -> float:
        first = self._waiting.first()
        return self._last if first is None else first.counter

    def _forget(self, floor: float) -> None:
        while (client := self._gone.first()) is not None and client.counter <= floor:
            self._gone.discard(client)
            del self._known[client.name]
