"""The torch-free half of serving as state machines: whatever comes in which order, the laws of the modules hold.

The runner is a stand-in that keeps the tokens themselves in the pages. It draws from what it reads back, so that an
answer is right only where pages, positions and recomputation are. Loads end when the machine says so, in any order.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from itertools import groupby

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from veneer.errors import ConfigError, FormatError, NonFiniteError
from veneer.serve.schedule.adapter_pool import AdapterPool
from veneer.serve.schedule.adapter_version import AdapterVersion, Residency
from veneer.serve.schedule.outputs import Logprob
from veneer.serve.schedule.pages import Pages
from veneer.serve.schedule.prefix_cache import root_of
from veneer.serve.schedule.request import Request, Status
from veneer.serve.schedule.scheduler import Limits, Scheduler
from veneer.serve.schedule.step_plan import DrawnToken, Sampled, StepPlan
from veneer.serve.schedule.stop_tokens import StopRule

EOS, STOP = 5, 7
FRONTS = {"a": 0, "b": 3, "c": 5, "d": 0}
BYTES = {"a": 0, "b": 23, "c": 61, "d": 37}
QUICK = settings(max_examples=60, stateful_step_count=40)


def drawn_after(version: str | None, tokens: tuple[int, ...]) -> int:
    """A token that depends on all tokens before it, and on the adapter."""
    return hashlib.sha256(repr((version, tokens)).encode()).digest()[0] % 23


def answer_alone(request: Request) -> list[int]:
    """The answer of a request that nobody disturbs, computed from its rule alone."""
    output: list[int] = []
    while True:
        output.append(drawn_after(request.version, (*request.prompt, *output)))
        if len(output) >= request.rule.min_tokens and output[-1] in {*request.rule.eos_ids, *request.rule.stop_ids}:
            return output
        if len(output) == request.rule.max_tokens:
            return output


class Guesses:
    """A draft of so many tokens, in which every so many-th is wrong."""

    def __init__(self, n: int, wrong: int) -> None:
        self.n, self.wrong = n, wrong

    def tokens(self, request: Request, most: int, share: float) -> list[int]:
        first = len(request.output)
        guess = answer_alone(request)[first : first + min(self.n, most)]
        return [(token + ((first + i) % self.wrong == 0)) % 23 for i, token in enumerate(guess)]

    def judge(self, request: Request, n_tried: int, n_right: int) -> None:
        assert 0 <= n_right <= n_tried <= self.n
        assert n_tried > 0


class TokenArena:
    """Pages whose bytes are the tokens themselves, each with the version that computed it.

    ``ends`` are the numbers of positions up to the last one that was written to each page, where a state is.
    """

    def __init__(self, block: int, *, states: bool = False) -> None:
        self.block, self.states, self.slots = block, states, dict[int, object]()
        self.ends = dict[int, int]()

    def go_on(self, pages: tuple[int, ...], first: int, stop: int) -> None:
        """Write the positions from ``first`` to ``stop``; the state before them must be that of the position before."""
        assert not first or self.ends[pages[(first - 1) // self.block]] == first
        for number in range(first // self.block, -(-stop // self.block)):
            self.ends[pages[number]] = min(stop, (number + 1) * self.block)

    def run(self, plan: StepPlan) -> Sampled:
        drawn, scored = {}, {}
        for s in plan.sequences:
            if self.states:
                first = s.n_front_there if s.n_front_there < s.n_front else s.start
                self.go_on(s.pages, first, s.start + len(s.tokens))
            at = [page * self.block + i for page in s.pages for i in range(self.block)]
            fronts = range(s.n_front_there, s.n_front)
            self.slots.update({at[i]: ("front", s.version, i) for i in fronts})
            self.slots.update({at[s.start + i]: (s.version, token) for i, token in enumerate(s.tokens)})
            found = [self.slots[i] for i in at[: s.start + len(s.tokens)]]
            assert found[: s.n_front] == [("front", s.version, i) for i in range(s.n_front)]
            assert all(version == s.version for version, _ in found[s.n_front :])
            seen = [token for _, token in found[s.n_front :]]
            if s.samples:
                drawn[s.request_id] = [
                    DrawnToken(drawn_after(s.version, tuple(seen[: len(seen) - n]))) for n in range(s.n_drafted, -1, -1)
                ]
                right = [each.token == guess for each, guess in zip(drawn[s.request_id], s.drafted, strict=False)]
                drawn[s.request_id] = drawn[s.request_id][: 1 + [*right, False].index(False)]
            if s.targets:
                scored[s.request_id] = [{t: Logprob(-1.0)} for t in s.targets]
                own = seen[s.start - s.n_front + s.first_scored :]
                assert tuple(own[1:]) == s.targets[: len(own) - 1]
        return Sampled(drawn, scored)


class Serving(RuleBasedStateMachine):
    """Requests come, go and are aborted, adapters are named, replaced, forgotten and fail, the cache is reset, and
    steps are made. Prompts differ in their ends alone, so that requests share them. Some have a salt, and some share
    nothing.
    """

    @initialize(
        n_pages=st.integers(6, 14), block=st.integers(2, 5), n_resident=st.sampled_from([None, 1, 2, 3]),
        n_acting=st.sampled_from([None, 1, 2]), max_seqs=st.integers(1, 6), budget=st.integers(1, 9),
        page_bytes=st.integers(3, 17), more_bytes=st.integers(0, 130),
        n_fixed=st.sampled_from([0, 0, 1, 2]), states=st.booleans(),
    )  # fmt: skip
    def begin(self, n_pages, block, n_resident, n_acting, max_seqs, budget, page_bytes, more_bytes, n_fixed, states):
        n_bytes, sizes = n_pages * page_bytes + more_bytes, {"page_bytes": page_bytes, "n_fixed": n_fixed}
        self.pages = Pages(n_pages, block, n_bytes=n_bytes, rewritable=not states, **sizes)
        self.pool = AdapterPool(n_resident, n_acting, self.pages)
        self.budget, self.with_memory = budget, set[int]()
        self.loaded: dict[str, int] = {}  # what the runner has, with its bytes
        limits = Limits(max_seqs=max_seqs, max_batched_tokens=budget, max_model_len=self.pages.capacity(0))
        self.scheduler, self.arena = Scheduler(self.pages, self.pool, limits), TokenArena(block, states=states)
        self.requests: list[Request] = []
        self.salts: dict[str, str | None] = {}
        self.broken: set[str] = set()
        self.failed: set[str] = set()
        self.told: Counter[str] = Counter()
        self.generation = 0
        for name in FRONTS:
            self.bind(name)

    def bind(self, name):
        self.generation += 1
        version = AdapterVersion(id=f"{name}{self.generation}", folder=name, n_front=FRONTS[name], n_bytes=BYTES[name])
        self.pool.bind(name, version)

    @rule(
        name=st.sampled_from([None, *FRONTS]),
        n_prompt=st.integers(1, 11),
        longest=st.integers(1, 9),
        scores=st.booleans(),
        client=st.sampled_from([None, "p", "q"]),
        priority=st.sampled_from([0, 0, 0, -3, 5]),
        streams=st.booleans(),
        kind=st.integers(0, 2),
        salt=st.sampled_from([None, None, "s", "t"]),
        shares=st.sampled_from([True, True, True, False]),
        times=st.sampled_from([1, 1, 1, 3]),
        guesses=st.builds(Guesses, st.integers(1, 7), st.integers(2, 5)) | st.none(),
    )
    def add(self, name, n_prompt, longest, scores, client, priority, streams, kind, salt, shares, times, guesses):
        for index in range(times):
            asks = scores and not index
            self.add_one(name, n_prompt, longest, asks, client, priority, streams, kind, salt, shares, guesses)

    def add_one(self, name, n_prompt, longest, scores, client, priority, streams, kind, salt, shares, guesses):
        version = self.pool.names.get(name)
        n_front = version.n_front if version else 0
        room = self.scheduler.limits.max_model_len - n_front - n_prompt
        number = len(self.requests)
        request = Request(
            id=f"r{number}", prompt=tuple((i * 7 + kind * (i >= n_prompt - 2)) % 23 for i in range(n_prompt)),
            rule=StopRule(
                max_tokens=max(1, min(longest, room)), min_tokens=longest // 3,
                eos_ids=frozenset({EOS}), stop_ids=frozenset({STOP}),
            ),
            version=version.id if version else None, n_front=n_front, scores_prompt=scores,
            client=client or name, priority=priority, streams=streams,
            root=root_of(version.id if version else None, salt) if shares else None,
            draft=None if self.arena.states else guesses,
        )  # fmt: skip
        self.salts[request.id] = salt
        if room < 1:
            with pytest.raises(ConfigError, match="maximum context length"):
                self.scheduler.add(request)
            return
        self.scheduler.add(request)
        self.requests.append(request)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data):
        request = data.draw(st.sampled_from(self.requests))
        if request.status is not Status.DONE:
            self.scheduler.end(request, "abort")
            self.told[request.id] += 1  # who asks for it knows
            self.pool.tidy()
            self.make_way()

    @rule()
    def reset(self):
        self.pages.reset()
        assert self.pages.n_cached == 0

    @rule(name=st.sampled_from(sorted(FRONTS)))
    def replace(self, name):
        self.bind(name)

    @rule(name=st.sampled_from(sorted(FRONTS)))
    def forget_and_name_again(self, name):
        if name in self.pool.names:
            self.pool.forget(name)
        assert name not in self.pool.names
        self.bind(name)

    @rule(name=st.sampled_from(sorted(FRONTS)), pinned=st.booleans())
    def pin(self, name, pinned):
        if name in self.pool.names:
            (self.pool.pin if pinned else self.pool.unpin)(name)

    @rule(name=st.sampled_from(sorted(FRONTS)))
    def break_files(self, name):
        version = self.pool.names[name].id if name in self.pool.names else None
        if version is not None and not self.pool.is_resident(version):
            self.broken.add(version)

    @precondition(lambda self: self.pool.loading)
    @rule(data=st.data(), more=st.integers(-9, 9))
    def end_load(self, data=None, more=0):
        """A load ends, with another number of bytes than was expected."""
        version = self.pool.loading[0] if data is None else data.draw(st.sampled_from(self.pool.loading))
        if not self.pool.is_needed(version):
            self.pool.abandoned(version)
        elif version in self.broken:
            waiting = sorted((r for r in self.scheduler.waiting if r.version == version), key=lambda r: r.arrival)
            assert self.scheduler.fail(version, FormatError("broken")) == waiting
            assert not any(r.version == version for r in self.scheduler.running)
            self.told.update(request.id for request in waiting)
            self.pool.failed(version)
            assert version not in self.pool.known
        elif self.pool.settle(version, n_bytes := max(0, BYTES[version[0]] + more)):
            self.make_way()
            assert version not in self.loaded
            self.loaded[version] = n_bytes
            self.pool.loaded(version)

    @rule(
        failing=st.sets(st.integers(0, 5), max_size=2),
        seconds=st.floats(1e-4, 3.0),
        interrupted=st.sampled_from([False, False, False, False, True]),
    )
    def step(self, failing=frozenset(), seconds=0.1, interrupted=False):
        while (version := self.scheduler.begin_load()) is not None:
            assert version in {r.version for r in self.scheduler.waiting}
        oldest = self.scheduler.running[0] if self.scheduler.running else None
        before, preempted = self.longest_wait(), self.scheduler.n_preemptions
        plan = self.scheduler.plan()
        self.make_way()
        self.check(plan, oldest)
        self.check_wait(before, self.longest_wait(), preempted)
        self.with_memory |= {page for s in plan.sequences for page in s.pages}
        if interrupted:
            self.interrupt(plan)
            return
        sampled = self.arena.run(plan)
        self.check_read(plan)
        n_read = sum(len(s.tokens) for s in plan.sequences if not s.decodes)
        if not any(s.n_drafted for s in plan.sequences):
            self.scheduler.pace.observe(sum(s.decodes for s in plan.sequences), n_read, seconds)
        failed = {s.request_id: NonFiniteError("x") for i, s in enumerate(plan.sequences) if i in failing}
        self.failed |= failed.keys()
        for request in self.scheduler.commit(plan, replace(sampled, failed=failed)):
            assert request.n_scored <= len(request.prompt) - 1
            self.told[request.id] += request.status is Status.DONE
        for request in self.scheduler.running:  # no page for what was rejected
            assert len(self.pages.table(request.id)) <= self.pages.needed(request.n_positions)
        if not plan.sequences and (stuck := self.scheduler.stuck()) is not None:
            self.check_stuck(stuck)
            self.scheduler.end(stuck, "error", ConfigError("no memory"))
            self.failed.add(stuck.id)
            self.told[stuck.id] += 1
        self.pool.tidy()
        self.make_way()

    def interrupt(self, plan):
        """All tokens of a step are in the pages, or only those of its first sequences, and nobody knows."""
        with suppress(KeyboardInterrupt), self.scheduler.once(plan):
            self.arena.run(StepPlan(plan.sequences[: (len(plan.sequences) + 1) // 2]))
            raise KeyboardInterrupt
        self.pool.tidy()
        self.make_way()

    def check_read(self, plan):
        """Check that a sequence reads its own tokens, whoever wrote them."""
        requests = {request.id: request for request in self.scheduler.running}
        for s in plan.sequences:
            at = [page * self.pages.block + i for page in s.pages for i in range(self.pages.block)]
            read = [self.arena.slots[i] for i in at[s.n_front : s.start + len(s.tokens) - s.n_drafted]]
            own = (*requests[s.request_id].prompt, *requests[s.request_id].output)
            assert read == [(s.version, token) for token in own[: len(read)]]

    def make_way(self):
        while self.pool.going:
            version = self.pool.going.popleft()
            assert not any(r.version == version for r in self.scheduler.running)
            assert version not in self.pinned()
            del self.loaded[version]
        held = {page for request in self.scheduler.running for page in self.pages.table(request.id)}
        for page in self.pages.shed:
            if page not in held:
                self.with_memory.discard(page)
        self.pages.shed.clear()

    def pinned(self):
        return {id for id in self.pool.known if self.pool._entries[id].pinned}

    def check_stuck(self, request):
        """Even if all that may go had gone, there would be no place."""
        assert not self.pool.loading
        kept = self.pinned() & set(self.pool.resident) | {request.version}
        others = sum(self.pool._entries[id].n_bytes for id in kept if id is not None)
        needed = self.pages.needed(request.n_front + request.n_tokens)
        n_there = len({*self.pinned()} & {*self.pool.resident} - {request.version})
        no_place = self.pool.n_resident is not None and n_there >= self.pool.n_resident
        assert no_place or others + needed * self.pages.page_bytes > self.pages.n_bytes

    def longest_wait(self):
        """The first request that waits for an adapter, where that has no place, with its place in the order, and how
        many tokens the version that ends first has to come, of those that may go; None where it has one.

        Of one behind it nothing is said: others may enter, and it waits for these.
        """
        request = next((r for r in self.scheduler.waiting if r.version), None)
        if request is None or self.pool.is_resident(request.version) or self.pool.will_load(request.version):
            return None
        going = {r.version for r in self.scheduler.running} - {None} - self.pinned()
        left = [max(r.n_to_come for r in self.scheduler.running if r.version == version) for version in going]
        return (request.id, self.scheduler.waiting.key(request)), min(left, default=None)

    def check_wait(self, before, after, preempted):
        """Check that a request without a place is overtaken, and does not wait longer for that.

        In a step that takes pages from a request nobody enters.
        """
        if self.scheduler.n_preemptions > preempted:
            assert not self.scheduler.admitted
            return
        if before is None or after is None or None in (before[1], after[1]) or before[0] != after[0]:
            return
        assert after[1] <= before[1]

    def check(self, plan, oldest):
        ids = [s.request_id for s in plan.sequences]
        assert len(set(ids)) == len(ids)
        assert plan.n_tokens <= self.budget
        assert all(s.tokens for s in plan.sequences)
        assert all(s.decodes for s in plan.sequences) or not any(s.n_drafted for s in plan.sequences)
        order = [version for version, _ in groupby(s.version for s in plan.sequences)]
        assert len(set(order)) == len(order)
        assert None not in order[1:]
        assert all(self.pool.is_resident(v) for v in order if v is not None)
        assert self.pool.n_acting is None or len({*order} - {None}) <= self.pool.n_acting
        assert oldest is None or oldest in self.scheduler.running
        assert plan.sequences or not self.scheduler.running or self.pool.loading or self.scheduler.stuck()
        holders = Counter(page for r in self.scheduler.running for page in self.pages.table(r.id))
        for s in plan.sequences:
            assert s.start == s.n_front or s.n_front_there == s.n_front
            first = s.n_front_there if s.n_front_there < s.n_front else s.start
            written = s.pages[first // self.pages.block : self.pages.needed(s.start + len(s.tokens))]
            assert all(holders[page] == 1 and page not in self.pages._cache for page in written)

    @invariant()
    def who_shares_a_page_has_the_same_tokens_behind_the_same_root(self):
        if not hasattr(self, "pages"):
            return
        seen: dict[int, object] = {}
        for r in self.scheduler.running:
            tokens = (*[None] * r.n_front, *r.prompt, *r.output)
            for i, page in enumerate(self.pages.table(r.id)):
                upto = (i, r.version, self.salts[r.id], tokens[: (i + 1) * self.pages.block])
                if page in seen or page in self.pages._cache:
                    assert len(upto[3]) == (i + 1) * self.pages.block
                assert seen.setdefault(page, upto) == upto

    @invariant()
    def requests_wait_for_blocks_of_others_in_the_batch_alone(self):
        if not hasattr(self, "pages"):
            return
        sharing, scheduler = self.scheduler.sharing, self.scheduler
        assert {*sharing._computing.values()} <= {*scheduler.running}
        assert {*sharing._awaited.values()} == {*sharing._parked} <= {*sharing._computing}
        there = Counter([*scheduler.running, *scheduler.waiting, *sharing._awaited])
        assert there == Counter(r for r in self.requests if r.status is not Status.DONE)
        assert len(scheduler.running) + sharing.n_parked <= scheduler.limits.max_seqs

    @invariant()
    def a_page_is_free_or_cached_or_held(self):
        if not hasattr(self, "pages"):
            return
        held = {page for r in self.scheduler.running for page in self.pages.table(r.id)}
        blocks = list(self.pages._cache._blocks.values())
        cached = {block.page for block in blocks} - held
        free = self.pages._kept + self.pages._fresh
        assert sorted([*free, *cached, *held]) == list(range(self.pages.n_pages))
        assert (len(held), len(cached)) == (self.pages.n_held, self.pages.n_cached)
        for block in blocks:  # children go out before their parents
            assert block.parent is None or self.pages._cache._blocks[block.parent.key] is block.parent
            assert block.is_idle == (block.page not in held)
            children = [other for other in blocks if other.parent is block]
            assert block.n_children == len(children)
            assert not block.is_idle or all(other.is_idle for other in children)

    @invariant()
    def pages_are_held_by_requests_in_the_batch_alone(self):
        if not hasattr(self, "pages"):
            return
        running = self.scheduler.running
        for request in self.requests:
            held = self.pages.table(request.id)
            computed = request.n_front_there + request.n_computed
            assert (request in running) or not held
            assert request in running or request.status is not Status.RUNNING
            assert self.pages.needed(computed) <= len(held) or request.status is Status.DONE

    @invariant()
    def bytes_never_exceed_the_budget(self):
        if not hasattr(self, "pages"):
            return
        entries = self.pool._entries.values()
        lent = sum(e.n_bytes for e in entries if e.residency is not Residency.ABSENT)
        assert self.pages.n_lent == lent
        assert self.pages.n_lent + len(self.with_memory) * self.pages.page_bytes <= self.pages.n_bytes
        assert {id: self.pool._entries[id].n_bytes for id in self.pool.resident} == self.loaded

    @invariant()
    def every_ended_request_is_told_once(self):
        for request in getattr(self, "requests", ()):
            assert self.told[request.id] == (request.status is Status.DONE)

    @invariant()
    def no_more_adapters_than_there_are_places(self):
        if not hasattr(self, "pool"):
            return
        n_there = len(self.pool.resident) + len(self.pool.loading)
        assert self.pool.n_resident is None or n_there <= self.pool.n_resident
        assert all(self.pool.is_resident(r.version) for r in self.scheduler.running if r.version)

    def teardown(self):
        if not hasattr(self, "pages"):
            return
        for _ in range(20 * sum(r.n_tokens + r.rule.max_tokens for r in self.requests) + 20):
            if not self.scheduler.has_work:
                break
            self.step()
            if self.pool.loading:
                self.end_load()
        assert not self.scheduler.has_work
        assert self.pages.n_held == 0
        for request in self.requests:
            if request.finish_reason in ("stop", "length"):
                assert request.output == answer_alone(request)
                assert request.finish_reason == "length" or request.output[-1] in (EOS, STOP)
                assert request.n_scored == (len(request.prompt) - 1) * request.scores_prompt
            elif request.finish_reason == "error":
                assert request.version in self.broken or request.id in self.failed
            else:
                assert request.finish_reason == "abort"
        for name in list(self.pool.names):
            self.pool.forget(name)
        while self.pool.loading:
            self.end_load()
        self.pool.tidy()
        self.make_way()
        assert (self.pool.known, self.loaded, self.pages.n_lent) == (frozenset(), {}, 0)
        assert not self.scheduler.sharing._computing
        assert not self.scheduler.sharing.n_parked
        self.pages.reset()
        assert self.pages.n_free == self.pages.n_pages


TestServing = Serving.TestCase
TestServing.settings = QUICK
