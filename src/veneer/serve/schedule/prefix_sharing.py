"""Pages that requests share: a request takes the pages of a computed prefix, or waits while another request computes
it.

No torch. Invariants:

- The last token of a request is always computed, and so is every prompt token whose successor is to be scored.
- A page is written by its only holder, before it is published. A request that continues a sequence takes over the
  sequence's last page.
- A request waits only for one that is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile

from veneer.serve.schedule.pages import Owner, Pages
from veneer.serve.schedule.prefix_cache import Tail
from veneer.serve.schedule.request import Request


class PrefixSharing:
    """Blocks of the requests in the batch, by key, so that requests with equal beginnings compute a block once.

    A request without a ``root`` shares nothing, nor does one whose version ``is_apart``.
    """

    def __init__(self, pages: Pages) -> None:
        self.pages = pages
        self.is_apart: Callable[[str | None], bool] = lambda version: False
        self._computing: dict[bytes, Request] = {}  # full blocks of known tokens, by who will publish them
        self._parked: dict[bytes, dict[Request, None]] = {}  # who waits for a block
        self._awaited: dict[Request, bytes] = {}

    @property
    def n_parked(self) -> int:
        """Number of requests that wait for a block."""
        return len(self._awaited)

    def park(self, request: Request) -> bool:
        """Let a request wait if another request computes the first block that it lacks. Return True if it waits.

        It waits for all consecutive blocks from there on that the other request computes.
        """
        keys = self.usable(request)
        lacking = keys[self.pages.n_found(keys) :]
        writer = self._computing.get(lacking[0]) if lacking else None
        if writer is None:
            return False
        *_, last = takewhile(lambda key: self._computing.get(key) is writer, lacking)
        self._parked.setdefault(last, {})[request] = None
        self._awaited[request] = last
        return True

    def unpark(self, request: Request) -> bool:
        """End a request's wait for a block; return False if it did not wait."""
        key = self._awaited.pop(request, None)
        if key is None:
            return False
        del self._parked[key][request]
        if not self._parked[key]:
            del self._parked[key]
        return True

    def take(self, request: Request) -> None:
        """Give a waiting request the cached pages of its prefix, and a cached, partly filled page that continues the
        prefix.
        """
        block, last = self.pages.block, self._limit(request)
        first = self.pages.share(request.id, self.usable(request)) * block
        if self._shares(request) and first < last:
            tail = self._tail(request, first, min(first + block, last))
            self._put(request, first + self.pages.take_tail(request.id, tail))
        else:
            self._put(request, first)

    def give_up(self, request: Request, *, keeps_tail: bool = True) -> None:
        """Take all pages from a request. Those that a later request can reuse stay in the cache, its partly filled page
        if ``keeps_tail``.
        """
        last = request.n_front_there + request.n_computed
        first = last // self.pages.block * self.pages.block
        keeps = keeps_tail and self._shares(request) and first < last and request.finish_reason != "error"
        self.pages.release(request.id, self._tail(request, first, last) if keeps else None, self._owner(request))
        self._put(request, 0)

    def begin(self, request: Request) -> None:
        """Begin to compute the missing pages of a request, now that it is in the batch."""
        if request.n_cached is None:
            request.n_cached = request.n_computed
        if self._shares(request):
            self.pages.count_use(request.id)
            keys = request.keys(request.n_positions // self.pages.block, self.pages.block)
            for key in keys[self.pages.n_found(keys) :]:
                self._computing.setdefault(key, request)

    def publish(self, request: Request) -> list[Request]:
        """Publish the blocks that a request has filled since the last call.

        Return the requests that waited for one of these blocks; their wait has ended.
        """
        n = (request.n_front + request.n_computed) // self.pages.block
        if not self._shares(request) or n <= request.n_published:
            return []
        keys, first = request.keys(n, self.pages.block), request.n_published
        self.pages.publish(request.id, keys, first, self._owner(request))
        request.n_published = n
        return self._freed(request, keys[first:])

    def leave(self, request: Request, *, keeps_tail: bool = True) -> list[Request]:
        """Take all pages from a request that leaves the batch, as `give_up` does.

        Return the requests that waited for a block that it was to compute; their wait has ended.
        """
        freed = self._freed(request, request.known_keys[request.n_published :])
        self.give_up(request, keeps_tail=keeps_tail)
        return freed

    def _shares(self, request: Request) -> bool:
        return request.root is not None and not self.is_apart(request.version)

    def _limit(self, request: Request) -> int:
        """Return the largest number of a request's positions that may come from the cache."""
        if request.scores_prompt and request.n_scored < len(request.prompt) - 1:
            return request.n_front + request.n_scored
        return request.n_positions - 1

    def usable(self, request: Request) -> list[bytes]:
        """Return the keys of the blocks that a request may take from the cache instead of computing them."""
        block = self.pages.block
        return request.keys(self._limit(request) // block, block) if self._shares(request) else []

    def _owner(self, request: Request) -> Owner:
        first = (request.n_front + request.acts_from) // self.pages.block if request.acts_from else 0
        return Owner(request.version, first)

    def _tail(self, request: Request, first: int, last: int) -> Tail:
        """Return the part of a request from position ``first``, where a page begins, to position ``last``."""
        n_front, n_full = request.n_front, first // self.pages.block
        parent = request.keys(n_full, self.pages.block)[-1] if n_full else request.root or b""
        n_virtual, end = max(0, min(n_front, last) - first), max(0, last - n_front)
        tokens = request.tokens(max(0, first - n_front), end)
        return Tail(parent, n_full, n_virtual, tokens, request.owner_of(end))

    def _put(self, request: Request, n_positions: int) -> None:
        request.n_front_there = min(n_positions, request.n_front)
        request.n_computed = n_positions - request.n_front_there
        request.n_published = n_positions // self.pages.block

    def _freed(self, request: Request, keys: list[bytes]) -> list[Request]:
        """End the wait of the requests that wait for ``request`` to compute the blocks with these keys. Return those
        requests.
        """
        freed = list[Request]()
        for key in keys:
            if self._computing.get(key) is request:
                del self._computing[key]
                freed += self._parked.pop(key, ())
        for each in freed:
            del self._awaited[each]
        return freed
