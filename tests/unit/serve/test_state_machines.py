"""The torch-free half of serving as state machines: whatever comes in which order, the laws of the modules hold.

The runner is a stand-in that keeps the tokens themselves in the pages. It draws from what it reads back, so that an
answer is right only where pages, positions and recomputation are.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from itertools import groupby

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from veneer.errors import AdapterNameError, ConfigError, FormatError, NonFiniteError
from veneer.serve.adapter_pool import AdapterPool, AdapterVersion
from veneer.serve.inbox import Inbox
from veneer.serve.outputs import Logprob
from veneer.serve.pages import Pages
from veneer.serve.plan import Drawn, Plan, Sampled
from veneer.serve.request import Request, Status, StopRule
from veneer.serve.scheduler import Limits, Scheduler

EOS, STOP = 5, 7
FRONTS = {"a": 0, "b": 3, "c": 5, "d": 0}
QUICK = settings(max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))


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


class TokenArena:
    """Pages whose bytes are the tokens themselves."""

    def __init__(self, block: int) -> None:
        self.block, self.slots = block, dict[int, object]()

    def run(self, plan: Plan) -> Sampled:
        drawn, scored = {}, {}
        for s in plan.sequences:
            at = [page * self.block + i for page in s.pages for i in range(self.block)]
            if s.start == s.n_front:
                self.slots.update({at[i]: ("front", s.version) for i in range(s.n_front)})
            self.slots.update({at[s.start + i]: token for i, token in enumerate(s.tokens)})
            seen = [self.slots[i] for i in at[: s.start + len(s.tokens)]]
            assert seen[: s.n_front] == [("front", s.version)] * s.n_front
            if s.samples:
                drawn[s.request_id] = Drawn(drawn_after(s.version, tuple(seen[s.n_front :])))
            if s.targets:
                scored[s.request_id] = [{t: Logprob(-1.0)} for t in s.targets]
                own = seen[s.n_front :][s.start - s.n_front + s.first_scored :]
                assert tuple(own[1:]) == s.targets[: len(own) - 1]
        return Sampled(drawn, scored)


class Serving(RuleBasedStateMachine):
    """Requests come, go and are aborted, adapters are named, replaced, forgotten and fail, and steps are made."""

    @initialize(
        n_pages=st.integers(6, 14), block=st.integers(2, 5), n_resident=st.sampled_from([None, 1, 2, 3]),
        n_acting=st.sampled_from([None, 1, 2]), max_seqs=st.integers(1, 6), budget=st.integers(1, 9),
    )  # fmt: skip
    def begin(self, n_pages, block, n_resident, n_acting, max_seqs, budget):
        self.pages, self.pool = Pages(n_pages, block), AdapterPool(n_resident, n_acting)
        self.budget = budget
        limits = Limits(max_seqs=max_seqs, max_batched_tokens=budget, max_model_len=n_pages * block)
        self.scheduler, self.arena = Scheduler(self.pages, self.pool, limits), TokenArena(block)
        self.requests: list[Request] = []
        self.broken: set[str] = set()
        self.failed: set[str] = set()
        self.told: Counter[str] = Counter()
        self.generation = 0
        for name in FRONTS:
            self.bind(name)

    def bind(self, name):
        self.generation += 1
        self.pool.bind(name, AdapterVersion(id=f"{name}{self.generation}", folder=name, n_front=FRONTS[name]))

    @rule(
        name=st.sampled_from([None, *FRONTS]),
        n_prompt=st.integers(1, 11),
        longest=st.integers(1, 9),
        scores=st.booleans(),
    )
    def add(self, name, n_prompt, longest, scores):
        version = self.pool.names.get(name)
        n_front = version.n_front if version else 0
        room = self.scheduler.limits.max_model_len - n_front - n_prompt
        number = len(self.requests)
        request = Request(
            id=f"r{number}", prompt=tuple((number * 31 + i * 7) % 23 for i in range(n_prompt)),
            rule=StopRule(
                max_tokens=max(1, min(longest, room)), min_tokens=longest // 3,
                eos_ids=frozenset({EOS}), stop_ids=frozenset({STOP}),
            ),
            version=version.id if version else None, n_front=n_front, scores_prompt=scores,
        )  # fmt: skip
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
        if name in self.pool.names and (not pinned or self.pool.n_resident is None):
            (self.pool.pin if pinned else self.pool.unpin)(name)

    @rule(name=st.sampled_from(sorted(FRONTS)))
    def break_files(self, name):
        if name in self.pool.names and not self.pool.is_resident(self.pool.names[name].id):
            self.broken.add(self.pool.names[name].id)

    @rule(failing=st.sets(st.integers(0, 5), max_size=2))
    def step(self, failing=frozenset()):
        self.load_one()
        oldest = self.scheduler.running[0] if self.scheduler.running else None
        plan = self.scheduler.plan()
        self.check(plan, oldest)
        sampled = self.arena.run(plan)
        failed = {s.request_id: NonFiniteError("x") for i, s in enumerate(plan.sequences) if i in failing}
        self.failed |= failed.keys()
        for request in self.scheduler.commit(plan, replace(sampled, failed=failed)):
            assert request.n_scored <= len(request.prompt) - 1
            self.told[request.id] += request.status is Status.DONE
        for version in self.pool.unneeded():
            self.pool.unloaded(version)
        self.pool.tidy()

    def load_one(self):
        version, victim = self.pool.next_load(self.scheduler.wanted())
        if victim is not None:
            assert not any(r.version == victim for r in self.scheduler.running)
            self.pool.unloaded(victim)
        if version in self.broken:
            self.pool.failed(version)
            waiting = [r for r in self.scheduler.waiting if r.version == version]
            assert self.scheduler.fail(version, FormatError("broken")) == waiting
            self.told.update(request.id for request in waiting)
            self.pool.tidy()
        elif version is not None:
            self.pool.loaded(version)

    def check(self, plan, oldest):
        ids = [s.request_id for s in plan.sequences]
        assert len(set(ids)) == len(ids)
        assert plan.n_tokens <= self.budget
        assert all(s.tokens for s in plan.sequences)
        order = [version for version, _ in groupby(s.version for s in plan.sequences)]
        assert len(set(order)) == len(order)
        assert None not in order[1:]
        assert all(self.pool.is_resident(v) for v in order if v is not None)
        assert self.pool.n_acting is None or len({*order} - {None}) <= self.pool.n_acting
        assert oldest is None or oldest in self.scheduler.running
        assert bool(plan.sequences) == bool(self.scheduler.running)

    @invariant()
    def pages_are_held_by_requests_in_the_batch_alone(self):
        if not hasattr(self, "pages"):
            return
        running = self.scheduler.running
        tables = [page for request in running for page in self.pages.table(request.id)]
        assert len(set(tables)) == len(tables) == self.pages.n_pages - self.pages.n_free
        for request in self.requests:
            held = self.pages.table(request.id)
            computed = request.n_front + request.n_computed if request.n_computed else 0
            assert (request in running) or not held
            assert request in running or request.status is not Status.RUNNING
            assert self.pages.needed(computed) <= len(held) or request.status is Status.DONE

    @invariant()
    def every_ended_request_is_told_once(self):
        for request in getattr(self, "requests", ()):
            assert self.told[request.id] == (request.status is Status.DONE)

    @invariant()
    def no_more_adapters_than_there_are_places(self):
        if not hasattr(self, "pool"):
            return
        assert self.pool.n_resident is None or len(self.pool.resident) <= self.pool.n_resident
        assert all(self.pool.is_resident(r.version) for r in self.scheduler.running if r.version)

    def teardown(self):
        if not hasattr(self, "pages"):
            return
        for _ in range(20 * sum(r.n_tokens + r.rule.max_tokens for r in self.requests) + 20):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work
        assert self.pages.n_free == self.pages.n_pages
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
        for version in self.pool.unneeded():
            self.pool.unloaded(version)
        assert self.pool.resident == []


TestServing = Serving.TestCase
TestServing.settings = QUICK


def scheduler(n_pages=7, block=3, n_resident=None, n_acting=None, **limits):
    pages, pool = Pages(n_pages, block), AdapterPool(n_resident, n_acting)
    return Scheduler(pages, pool, Limits(**({"max_model_len": n_pages * block} | limits)))


def request(name, n_prompt=2, version=None, longest=4):
    return Request(id=name, prompt=tuple(range(n_prompt)), rule=StopRule(max_tokens=longest), version=version)


def test_the_same_trace_gives_the_same_plans():
    def trace():
        made, arena, plans = scheduler(n_pages=5), TokenArena(3), []
        for i in range(5):
            made.add(request(f"r{i}", n_prompt=3 + i, longest=5))
        while made.has_work:
            plans.append(made.plan())
            made.commit(plans[-1], arena.run(plans[-1]))
        return plans

    assert trace() == trace()


def test_a_younger_request_does_not_keep_the_only_place_for_ever():
    """An adapter that others keep in use goes out once an older request waits for its place."""
    made, arena = scheduler(n_resident=1), TokenArena(3)
    for name in "xy":
        made.pool.bind(name, AdapterVersion(id=name, folder=name))
    made.pool.loaded("x")
    made.add(request("x0", version="x", longest=2))
    plan = made.plan()
    made.commit(plan, arena.run(plan))
    made.add(request("y0", version="y"))
    for i in range(1, 6):
        made.add(request(f"x{i}", version="x"))
        assert made.pool.next_load(made.wanted())[0] == (None if made.running else "y")
        plan = made.plan()
        made.commit(plan, arena.run(plan))
    assert all(r.id != "x0" and r.n_computed == 0 for r in made.waiting)
    assert made.pool.next_load(made.wanted()) == ("y", "x")


def test_base_requests_do_not_wait_for_an_adapter():
    made = scheduler()
    made.pool.bind("x", AdapterVersion(id="x", folder="x"))
    made.add(request("cold", version="x"))
    made.add(request("base"))
    assert [s.request_id for s in made.plan().sequences] == ["base"]


def test_what_was_used_longest_ago_goes_first_and_pinned_ones_stay():
    pool = AdapterPool(2)
    for name in "xyz":
        pool.bind(name, AdapterVersion(id=name, folder=name))
    pool.loaded("x"), pool.loaded("y")
    assert pool.next_load(["z"]) == ("z", "x")
    pool.enter("x"), pool.acquire("x"), pool.release("x"), pool.leave("x")
    assert pool.next_load(["z"]) == ("z", "y")
    pool.pin("y")
    assert pool.next_load(["z"]) == ("z", "x")
    pool.unpin("y")
    assert pool.next_load(["y", "z"]) == ("z", "x")
    assert pool.next_load(["y", "x", "z"]) == (None, None)


def test_two_names_of_equal_content_are_one_version_and_forgetting_one_keeps_it():
    pool = AdapterPool()
    version = AdapterVersion(id="same", folder="x")
    pool.bind("one", version), pool.bind("two", version), pool.loaded("same")
    pool.forget("one")
    assert (pool.resident, pool.unneeded(), list(pool.names)) == (["same"], [], ["two"])
    pool.forget("two")
    assert pool.unneeded() == ["same"]


def test_names_that_are_not_known():
    pool = AdapterPool()
    for call in (pool.forget, pool.pin, pool.unpin):
        with pytest.raises(AdapterNameError, match="no adapter 'nobody'"):
            call("nobody")


def test_sizes_that_make_no_sense():
    with pytest.raises(ConfigError, match="at least one"):
        Pages(0, 16)
    with pytest.raises(ConfigError, match="room for one"):
        AdapterPool(0)
    with pytest.raises(ConfigError, match="max_seqs=0"):
        Limits(max_seqs=0)
    with pytest.raises(ConfigError, match="fewer than max_model_len=22"):
        scheduler(n_pages=7, block=3, max_model_len=22)


def test_prompts_that_cannot_be_run():
    with pytest.raises(ConfigError, match="prompt is empty"):
        scheduler().add(request("r", n_prompt=0))
    with pytest.raises(ConfigError, match="length is 21 tokens and the prompt has 21"):
        scheduler().add(request("r", n_prompt=21))
    behind = Request(id="r", prompt=tuple(range(17)), rule=StopRule(max_tokens=1), n_front=4)
    with pytest.raises(ConfigError, match="17 behind 4 virtual tokens"):
        scheduler().add(behind)


def test_the_inbox_gives_everything_once_and_in_order():
    inbox = Inbox[int]()
    assert not inbox.wait(0)
    inbox.put(3), inbox.put(5)
    assert inbox.wait(0)
    assert (inbox.drain(), inbox.drain(), inbox.wait(0)) == ([3, 5], [], False)
