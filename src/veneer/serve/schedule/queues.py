"""Waiting requests in queues by adapter and client, so that the next is found without a search. No torch."""

from __future__ import annotations

from collections.abc import Hashable, Iterator

from veneer.serve.schedule.adapter_pool import AdapterPool
from veneer.serve.schedule.fair_share import Client, FairShare
from veneer.serve.schedule.lazy_heap import LazyHeap
from veneer.serve.schedule.request import Request

Key = tuple[int, float, int]
"""The order of requests: by priority, then by what their client has received, then by arrival."""


class _Line:
    """Waiting requests of one client for one adapter version."""

    def __init__(self, client: Client) -> None:
        self.client, self.requests = client, dict[Request, None]()
        self._heap: LazyHeap[Request] = LazyHeap(lambda request: (request.priority, request.arrival))

    def add(self, request: Request) -> None:
        self.requests[request] = None
        self._heap.put(request)

    def remove(self, request: Request) -> None:
        del self.requests[request]
        self._heap.discard(request)

    def first(self) -> Request | None:
        return self._heap.first()

    def key(self) -> Key | None:
        first = self.first()
        return None if first is None else (first.priority, self.client.counter, first.arrival)


class _Queue:
    """Waiting requests for one adapter version, in one `_Line` for each client. Version None is the base model."""

    def __init__(self, version: str | None) -> None:
        self.version, self.lines = version, dict[Hashable, _Line]()
        self._heap: LazyHeap[_Line] = LazyHeap(_Line.key)

    def add(self, request: Request, client: Client) -> None:
        line = self.lines.get(client.name)
        if line is None:
            line = self.lines[client.name] = _Line(client)
        line.add(request)
        self._heap.put(line)

    def remove(self, request: Request) -> None:
        line = self.lines[request.client]
        line.remove(request)
        if not line.requests:
            del self.lines[request.client]
            self._heap.discard(line)

    def first(self) -> Request | None:
        line = self._heap.first()
        return None if line is None else line.first()

    def key(self) -> Key | None:
        line = self._heap.first()
        return None if line is None else line.key()


class Queues:
    """Waiting requests by adapter version and client.

    ``pool`` knows which adapter versions are in the batch, loaded, or absent. Each look-up first applies the pool's
    changes. It takes O(log n) in the numbers of requests, clients and versions.
    """

    def __init__(self, pool: AdapterPool, clients: FairShare) -> None:
        self._pool, self._clients = pool, clients
        self._queues: dict[str | None, _Queue] = {}
        self._closed: str | None = None
        self._n, self.n_tokens = 0, 0  # of the prompts
        self._acting: LazyHeap[_Queue] = LazyHeap(lambda q: q.key() if self._is_acting(q.version) else None)
        self._idle: LazyHeap[_Queue] = LazyHeap(lambda q: q.key() if self._is_idle(q.version) else None)
        self._absent: LazyHeap[_Queue] = LazyHeap(lambda q: q.key() if self._is_absent(q.version) else None)

    def __len__(self) -> int:
        return self._n

    def __contains__(self, request: Request) -> bool:
        queue = self._queues.get(request.version)
        line = None if queue is None else queue.lines.get(request.client)
        return line is not None and request in line.requests

    def __iter__(self) -> Iterator[Request]:
        """Yield all requests in order, for inspection: this sorts them."""
        return iter(sorted((r for queue in self._queues.values() for r in _all_of(queue)), key=self.key))

    @property
    def versions(self) -> list[str]:
        """Versions that requests wait for, loaded or not. Any thread may ask."""
        return [version for version in list(self._queues) if version is not None]

    def key(self, request: Request) -> Key:
        """Return a request's sort key: a lower one comes first."""
        return request.priority, self._clients[request.client].counter, request.arrival

    def add(self, request: Request) -> None:
        """Add a request, whose client has been counted."""
        queue = self._queues.get(request.version)
        if queue is None:
            queue = self._queues[request.version] = _Queue(request.version)
        queue.add(request, self._clients[request.client])
        self._n, self.n_tokens = self._n + 1, self.n_tokens + len(request.prompt)
        self._place(queue)

    def remove(self, request: Request) -> None:
        """Remove a request."""
        queue = self._queues[request.version]
        queue.remove(request)
        self._n, self.n_tokens = self._n - 1, self.n_tokens - len(request.prompt)
        if not queue.lines:
            del self._queues[request.version]
            for heap in (self._acting, self._idle, self._absent):
                heap.discard(queue)

    def of(self, version: str) -> list[Request]:
        """Return the requests for a version, oldest first."""
        queue = self._queues.get(version)
        return [] if queue is None else sorted(_all_of(queue), key=lambda request: request.arrival)

    def close(self, version: str | None) -> None:
        """Make `first` skip the requests for a version.

        This replaces the version closed before; None closes no version.
        """
        before, self._closed = self._closed, version
        if before in self._queues:
            self._place(self._queues[before])

    def first(self) -> Request | None:
        """Return the first request whose adapter version allows it to enter the batch now."""
        self._follow()
        return self._least(self._acting, *(() if self._pool.is_full else (self._idle,)))

    def absent(self) -> Request | None:
        """Return the first request whose version is neither loaded nor loading."""
        self._follow()
        return self._least(self._absent)

    def idle(self) -> Request | None:
        """Return the first request whose version is loaded and not in the batch."""
        self._follow()
        return self._least(self._idle)

    def blocked(self) -> list[Request]:
        """Return up to two requests, in order: the first whose version is neither loaded nor loading, and, if the batch
        admits no other version, the first whose version is loaded but not in the batch.
        """
        found = (self.absent(), self.idle() if self._pool.is_full else None)
        return sorted((request for request in found if request is not None), key=self.key)

    def head(self) -> Request | None:
        """Undo `close`. Return the first of all requests whose version is not loading."""
        self.close(None)
        self._follow()
        return self._least(self._acting, self._idle, self._absent)

    def _least(self, *heaps: LazyHeap[_Queue]) -> Request | None:
        found = [first for heap in heaps if (queue := heap.first()) is not None and (first := queue.first())]
        return min(found, key=self.key, default=None)

    def _follow(self) -> None:
        """Move each queue whose adapter version has changed its state (absent, idle, running) to that state's heap.

        Nothing is removed from the old heap here: a heap skips entries that no longer belong to it.
        """
        moved = self._pool.moved
        while moved:
            version, _ = moved.popitem()
            if version in self._queues:
                self._place(self._queues[version])

    def _place(self, queue: _Queue) -> None:
        for heap in (self._acting, self._idle, self._absent):
            heap.put(queue)

    def _is_acting(self, version: str | None) -> bool:
        return version is None or (version != self._closed and self._pool.is_acting(version))

    def _is_idle(self, version: str | None) -> bool:
        return version is not None and self._pool.is_resident(version) and not self._pool.is_acting(version)

    def _is_absent(self, version: str | None) -> bool:
        return version is not None and self._pool.is_absent(version)


def _all_of(queue: _Queue) -> list[Request]:
    return [request for line in queue.lines.values() for request in line.requests]
