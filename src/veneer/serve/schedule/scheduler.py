"""Scheduler: continuous batching with chunked prefill and preemption. No torch.

A request waits until there is a place in the batch, pages, and its adapter. It then computes its tokens, at most a
step's budget at a time, draws one token a step, and ends. It begins behind the blocks that others have computed, and
waits while one in the batch computes the next (`PrefixSharing`). Such a request is not among ``waiting``, and has a
place in the batch reserved. Among requests of the most urgent priority, the next comes from the client that has
received least (`FairShare`). If pages are too few, cached pages and idle adapters are evicted first. Then the newest
request of the client that has received most is preempted: it frees its pages and continues later. If an adapter finds
no place, the version in the batch that ends first admits no more requests. Requests of all others continue.

A step that reads no prompt and has few rows tries drafts (`Draft`) as further rows, on pages that nobody else needs.

The cost of a step depends on the batch alone, not on the number of waiting requests, clients and known adapters.

Invariants:
- A plan has each request at most once, and at most the budget's tokens; rows of one version are contiguous.
- The oldest request in the batch is never preempted, so that some request always ends.
- A request that has ended holds nothing, and is reported once.
- A request for which memory will never suffice ends with the reason.
- The plan is a function of the state.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from veneer.errors import ConfigError
from veneer.serve.schedule.adapter_pool import AdapterPool
from veneer.serve.schedule.fair_share import FairShare
from veneer.serve.schedule.outputs import FinishReason
from veneer.serve.schedule.pages import Pages
from veneer.serve.schedule.prefill_budget import PrefillBudget
from veneer.serve.schedule.prefix_sharing import PrefixSharing
from veneer.serve.schedule.queues import Queues
from veneer.serve.schedule.request import Request, Status
from veneer.serve.schedule.step_plan import PlannedSequence, Sampled, StepPlan

_CHEAP_ROWS = 16  # with so many a step takes about twice as long as with one: a row costs a sixteenth of a step


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a step: ``max_seqs`` requests in a batch, ``max_batched_tokens`` tokens.

    A sequence has at most ``max_model_len`` positions. At most ``max_waiting`` requests wait, with prompts of at most
    ``max_waiting_tokens`` tokens together. Raises ConfigError for a limit below 1.
    """

    max_seqs: int = 128
    max_batched_tokens: int = 512
    max_model_len: int = 2048
    max_waiting: int = 1 << 16
    max_waiting_tokens: int = 1 << 25

    def __post_init__(self) -> None:
        wrong = [f"{name}={value}" for name, value in vars(self).items() if value < 1]
        if wrong:
            raise ConfigError(f"{', '.join(wrong)} must be at least 1")


class Scheduler:
    """Requests that wait, in the order in which they are admitted, and requests in the batch, in the order of
    admission.
    """

    def __init__(self, pages: Pages, pool: AdapterPool, limits: Limits) -> None:
        if pages.capacity(0) < limits.max_model_len:
            raise ConfigError(
                f"memory for keys and values holds {pages.capacity(0)} positions, fewer than "
                f"max_model_len={limits.max_model_len}: lower max_model_len, or raise kv_cache_memory_bytes"
            )
        self.pages, self.pool, self.limits = pages, pool, limits
        self.clients, self.sharing = FairShare(), PrefixSharing(pages)
        self.waiting = Queues(pool, self.clients)
        self.running: list[Request] = []
        self.admitted: list[Request] = []
        """Requests that the last plan has admitted."""
        self.n_preemptions = 0
        self.pace = PrefillBudget()
        self._arrivals = itertools.count()

    @property
    def has_work(self) -> bool:
        """Return True if a request waits or is in the batch."""
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queue a request. Raises ConfigError if it could never be run."""
        self.require_room(len(request.prompt), request.n_front)
        request.arrival = next(self._arrivals)
        self.clients.enter(request.client, request.weight)
        if request.version is not None:
            self.pool.enter(request.version)
        self.waiting.add(request)

    def require_room(self, n_prompt: int, n_front: int, n_bytes: int | None = None) -> int:
        """Return the number of tokens that an answer to a prompt may have.

        It is limited by the context, and by the memory left besides an adapter's bytes. Raises ConfigError if it is
        zero.
        """
        longest, pinned = self.limits.max_model_len, self.pool.pinned_bytes
        fit = longest if n_bytes is None else self.pages.capacity(n_bytes + pinned)
        most = min(longest, fit)
        front = f" behind {n_front} virtual tokens" if n_front else ""
        if not n_prompt:
            raise ConfigError("the prompt is empty: give at least one token")
        if n_front + n_prompt >= most and fit < longest:
            raise ConfigError(
                f"the prompt has {n_prompt}{front}, and {fit} positions of keys and values are left of the "
                f"{self.pages.n_bytes} bytes: the adapter takes {n_bytes}, pinned ones {pinned}. Raise "
                "kv_cache_memory_bytes, or unpin adapters."
            )
        if n_front + n_prompt >= most:
            raise ConfigError(
                f"this model's maximum context length is {most} tokens and the prompt has {n_prompt}{front}, which "
                "leaves none for the answer: shorten it"
            )
        return most - n_front - n_prompt

    def end(self, request: Request, reason: FinishReason, error: Exception | None = None) -> None:
        """End a request early, or because of the text of its answer. Release its pages, its adapter's slot and its
        place in the queue.
        """
        if request.status is not Status.DONE:
            request.end(reason, error)
        self._drop(request)

    def fail(self, version: str, error: Exception) -> list[Request]:
        """End the requests that wait for a version that cannot be loaded; return them."""
        found = self.waiting.of(version)
        for request in found:
            self.end(request, "error", error)
        return found

    def begin_load(self) -> str | None:
        """Begin to load the version of the first request whose version is neither loaded nor loading. Return the
        version.

        Return None if there is no such request or no room. No version that an earlier request waits for is evicted.
        """
        request, idle = self.waiting.absent(), self.waiting.idle()
        if request is None or request.version is None:
            return None
        spares = idle is not None and self.waiting.key(idle) < self.waiting.key(request)
        return self.pool.begin_load([request.version], spares_awaited=spares)

    def stuck(self) -> Request | None:
        """Return the first request if nothing runs or loads that could let it continue; else None. Call it after an
        empty plan.
        """
        if self.pool.loading or not self.has_work:
            return None
        return self.running[0] if self.running else self.waiting.head()

    def plan(self) -> StepPlan:
        """Return the plan of the next step; admits and preempts requests, and evicts adapters."""
        planned: dict[Request, int] = {}
        self.admitted = []
        budget, to_read = self.limits.max_batched_tokens, self._to_read()
        share, measured = self._share(to_read), to_read > 0  # otherwise it must be seen how long decoding takes
        at_first = sorted(self.running, key=lambda r: r.n_left > 1)  # decoding first, each kind oldest first
        for request in at_first:
            reads = request.n_left > 1
            n, n_running = min(request.n_alike, budget, *([to_read, share] if reads else ())), len(self.running)
            if n and request.status is Status.RUNNING and self._reserve(request, n, planned):
                planned[request] = n
                budget -= n
                to_read -= n * reads
            if len(self.running) < n_running:  # what was planned for others may have been given up
                budget = self.limits.max_batched_tokens - sum(planned.values())
        if all(request.status is Status.RUNNING for request in at_first):  # pages just given back are not for others
            self._admit(planned, min(budget, to_read))
        drafts = self._drafts(planned) if measured else {}
        order = sorted(planned, key=lambda r: r.acting or "")  # the base's first
        return StepPlan(tuple(self._laid_out(request, planned[request], drafts.get(request, ())) for request in order))

    def _to_read(self) -> int:
        """Return the number of prompt rows that a step may read: fewer while an answer is being streamed."""
        decoding = [request for request in self.running if request.n_left == 1]
        most = self.limits.max_batched_tokens
        if not any(request.streams for request in decoding):
            return most
        n_requests = min(len(self.running) + len(self.waiting), self.limits.max_seqs)
        return self.pace.rows(len(decoding), n_requests, most)

    def _share(self, to_read: int) -> int:
        """Return the most rows that one prompt may take of a step's ``to_read`` prompt rows.

        If ``to_read`` is less than the limit of a step, the prompts in progress and the next one share it equally, so
        that a long prompt does not delay a short one.
        """
        if to_read == self.limits.max_batched_tokens:
            return to_read
        reading = sum(request.n_left > 1 for request in self.running)
        return -(-to_read // (reading + (bool(self.waiting) and self._has_seats) or 1))

    def _drafts(self, planned: dict[Request, int]) -> dict[Request, tuple[int, ...]]:
        """Return draft tokens for planned requests. Only free pages are used: no request is preempted and nothing
        evicted for them.

        A correct token saves one step for one of the n planned requests, which is 1/n of a step's work. A wrong token
        costs one row.
        """
        room = min(_CHEAP_ROWS, self.limits.max_batched_tokens) - sum(planned.values())
        if room < 1 or any(request.n_left > 1 for request in planned):
            return {}
        found = dict[Request, tuple[int, ...]]()
        for n_left, request in zip(range(len(planned), 0, -1), planned, strict=True):
            tokens = request.drafted(room // n_left, len(planned) / _CHEAP_ROWS)
            while tokens and not self.pages.has_free(request.id, request.n_positions + len(tokens)):
                tokens = tokens[:-1]
            if tokens and self.pages.grow(request.id, request.n_positions + len(tokens)):
                found[request] = tokens
                room -= len(tokens)
        return found

    def commit(self, plan: StepPlan, sampled: Sampled) -> list[Request]:
        """Apply the results of a step; return the requests that got a token or prompt scores, or ended."""
        by_id = {request.id: request for request in self.running}
        touched = []
        for sequence in plan.sequences:
            request = by_id[sequence.request_id]
            drawn = sampled.drawn.get(request.id, [])
            n_wrong = sequence.n_drafted - max(0, len(drawn) - 1)
            request.n_computed += len(sequence.tokens) - n_wrong
            request.n_front_there = request.n_front
            request.n_scored += len(sequence.targets)
            if request.id in sampled.failed:
                request.end("error", sampled.failed[request.id])
            else:
                for each in drawn:
                    request.draw(each.token)
                    self.clients.draw(self.clients[request.client])
                if sequence.n_drafted and request.draft is not None:
                    request.draft.judge(request, sequence.n_drafted, sequence.n_drafted - n_wrong)
                    self.pages.shrink(request.id, request.n_front + request.n_computed)
                self._wait(self.sharing.publish(request))
                if request.reads_only and sequence.samples:
                    request.end("stop")
            ended = request.status is Status.DONE
            if ended:
                self._drop(request)
            if ended or sequence.samples or sequence.targets:
                touched.append(request)
        return touched

    @contextmanager
    def once(self, plan: StepPlan) -> Iterator[None]:
        """Enter a context in which a step is computed. If it is interrupted and pages are not rewritable, its requests
        go on from their last full pages: the pages behind may hold the step's tokens or not.
        """
        try:
            yield
        except BaseException:
            planned = () if self.pages.rewritable else [sequence.request_id for sequence in plan.sequences]
            for request in [request for request in self.running if request.id in planned]:
                self._preempt(request, keeps_tail=False)
            raise

    def _reserve(self, request: Request, n: int, planned: dict[Request, int]) -> bool:
        """Reserve pages for n tokens, preempting other requests if needed. Return False if there are too few pages, or
        if this request itself was preempted.

        The oldest request is never preempted. If it finds too few pages, adapters that are being loaded hold the bytes.
        """
        n_positions = request.n_front + request.n_computed + n
        while not self._grow(request, n_positions):
            if len(self.running) < 2:
                return False
            victim = self._victim()
            planned.pop(victim, None)
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _victim(self) -> Request:
        """Return the request to preempt: the newest request of the client that has received most.

        Only requests of the least urgent priority count, and never the oldest in the batch.
        """
        places = range(1, len(self.running))
        newest = max(places, key=lambda i: (self.waiting.key(self.running[i])[:2], i))
        return self.running[newest]

    def _grow(
        self, request: Request, n_positions: int, kept: Collection[str] = (), *, spares_awaited: bool = False
    ) -> bool:
        """Get pages for ``n_positions``. Idle adapters are evicted for them, except the ``kept`` ones."""
        if self.pages.covers(request.id, n_positions):
            return True
        if not self.pool.make_room(request.id, n_positions, kept, spares_awaited=spares_awaited):
            return False
        return self.pages.grow(request.id, n_positions)

    def _preempt(self, request: Request, *, keeps_tail: bool = True) -> None:
        self.running.remove(request)
        if request.version is not None:
            self.pool.release(request.version)
        request.status = Status.WAITING
        request.n_preempted += 1
        self.n_preemptions += 1
        self.clients.back(self.clients[request.client])
        self._wait([request, *self.sharing.leave(request, keeps_tail=keeps_tail)])

    def _wait(self, requests: Collection[Request]) -> None:
        for request in requests:
            self.waiting.add(request)

    def _admit(self, planned: dict[Request, int], budget: int) -> None:
        self.waiting.close(None)
        passed = set[Request]()  # requests whose adapter has no slot, and that later requests have overtaken
        closed: str | None = None
        while budget and self._has_seats and (request := self.waiting.first()) is not None:
            # If the adapter of an earlier request has no slot, later requests are still admitted, except those of the
            # adapter that ends first: its slot is reserved. If bytes are missing, not slots, nothing is admitted.
            before = [r for r in self.waiting.blocked() if self.waiting.key(r) < self.waiting.key(request)]
            for blocked in before:
                if blocked.version is None or blocked in passed:
                    continue
                passed.add(blocked)
                closed = closed or self._closed_for(blocked.version)
                if self.pool.lacks_bytes(blocked.version):
                    return
            self.waiting.close(closed)
            if request.version is not None and request.version == closed:
                continue
            if self.sharing.park(request):
                self.waiting.remove(request)
                continue
            if not self._admits(request):
                return  # its turn comes first when pages are free
            planned[request] = min(request.n_alike, budget)
            budget -= planned[request]
            self._enter(request)

    @property
    def _has_seats(self) -> bool:
        return len(self.running) + self.sharing.n_parked < self.limits.max_seqs

    def _admits(self, request: Request) -> bool:
        """Reserve pages for all tokens of a request, and return True if there are enough.

        Neither its adapter nor those of earlier requests are evicted for it.
        """
        kept, idle = () if request.version is None else (request.version,), self.waiting.idle()
        spares = idle is not None and self.waiting.key(idle) < self.waiting.key(request)
        n, keys = request.n_positions, self.sharing.usable(request)
        if not self.pool.can_make_room(request.id, n, kept, keys=keys, spares_awaited=spares):
            return False  # asked in every step that it waits: nothing is taken in vain
        self.sharing.take(request)
        return self._grow(request, n, kept, spares_awaited=spares)

    def _closed_for(self, version: str) -> str | None:
        """Return the running adapter that must admit no more requests, so that the waiting ``version`` gets its slot.

        It is the adapter whose running requests end first. Return None if ``version`` is loading, if it can load
        without a request leaving the batch, or if no running adapter may be evicted. ``version`` then waits at most as
        long as the longest running request of the returned adapter, unless memory is short or a request is preempted.
        Even then the returned adapter admits no later request.
        """
        resident = self.pool.is_resident(version)
        if not resident and self.pool.will_load(version):
            return None
        left = dict[str, int]()
        for request in self.running:
            if request.version is not None and (resident or not self.pool.is_pinned(request.version)):
                left[request.version] = max(left.get(request.version, 0), request.n_to_come)
        return min(left, key=lambda v: (left[v], v)) if left else None

    def _enter(self, request: Request) -> None:
        self.waiting.remove(request)
        self.clients.begin(self.clients[request.client], 0 if request.n_preempted else request.n_left)
        self.running.append(request)
        self.admitted.append(request)
        request.status = Status.RUNNING
        self.sharing.begin(request)
        if request.version is not None:
            self.pool.acquire(request.version)

    def _laid_out(self, request: Request, n: int, draft: tuple[int, ...]) -> PlannedSequence:
        first, targets = request.unscored(n)
        return PlannedSequence(
            request_id=request.id,
            version=request.acting,
            tokens=request.stretch(n) + draft,
            start=request.n_front + request.n_computed,
            n_front=request.n_front,
            n_front_there=request.n_front_there,
            pages=self.pages.table(request.id),
            samples=n == request.n_left,
            first_scored=first,
            targets=targets,
            n_drafted=len(draft),
            reads_only=request.reads_only,
        )

    def _drop(self, request: Request) -> None:
        self._wait(self.sharing.leave(request))
        if request in self.running:
            self.running.remove(request)
            self.clients.end(self.clients[request.client])
            if request.version is not None:
                self.pool.release(request.version)
                self.pool.leave(request.version)
        elif self.sharing.unpark(request) or request in self.waiting:
            if request in self.waiting:
                self.waiting.remove(request)
            self.clients.leave(self.clients[request.client])
            if request.version is not None:
                self.pool.leave(request.version)
