"""The scheduler, the pool of adapters, their pages and the inbox, one situation after the other."""

from __future__ import annotations

import pytest

from veneer.errors import AdapterNameError, ConfigError, NonFiniteError
from veneer.serve.inbox import Inbox
from veneer.serve.schedule.adapter_pool import AdapterPool
from veneer.serve.schedule.adapter_version import AdapterVersion
from veneer.serve.schedule.pages import Pages
from veneer.serve.schedule.prefix_cache import root_of
from veneer.serve.schedule.request import Request
from veneer.serve.schedule.scheduler import Limits, Scheduler
from veneer.serve.schedule.step_plan import Sampled
from veneer.serve.schedule.stop_tokens import StopRule

from .test_state_machines import Guesses, TokenArena, answer_alone


def scheduler(n_pages=7, block=3, n_resident=None, n_acting=None, **limits):
    pages = Pages(n_pages, block)
    pool = AdapterPool(n_resident, n_acting, pages)
    return Scheduler(pages, pool, Limits(**({"max_model_len": n_pages * block} | limits)))


def request(name, n_prompt=2, version=None, longest=4, root=None):
    rule = StopRule(max_tokens=longest)
    return Request(id=name, prompt=tuple(range(n_prompt)), rule=rule, version=version, root=root)


def load(pool, *names):
    """Load versions, whatever has to go for them; what went."""
    for name in names:
        assert pool.begin_load([name]) == name
        pool.loaded(name)
    gone = list(pool.going)
    pool.going.clear()
    return gone


def step(made, arena):
    """A step that is planned, run and taken in."""
    plan = made.plan()
    made.commit(plan, arena.run(plan))


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
    load(made.pool, "x")
    made.add(request("x0", version="x", longest=2))
    step(made, arena)
    made.add(request("y0", version="y"))
    for i in range(1, 6):
        made.add(request(f"x{i}", version="x"))
        if not made.running:
            break
        assert made.begin_load() is None
        step(made, arena)
    assert all(r.id != "x0" and r.n_computed == 0 for r in made.waiting)
    assert (made.begin_load(), list(made.pool.going)) == ("y", ["x"])


def test_younger_requests_go_on_beside_one_that_has_no_place():
    """All versions but the one that ends first take more; its place is the older request's."""
    made, arena = scheduler(n_pages=23, n_resident=3), TokenArena(3)
    for name in "wxyz":
        made.pool.bind(name, AdapterVersion(id=name, folder=name))
    load(made.pool, "x", "y", "w")
    made.pool.pin("w")
    for name, longest in {"x": 5, "y": 3, "w": 2}.items():
        made.add(request(f"{name}0", version=name, longest=longest))
    step(made, arena)
    made.add(request("z0", version="z"))
    for name in "ywx":
        made.add(request(f"{name}1", version=name, longest=7))
    assert made.begin_load() is None
    plan = made.plan()
    assert {s.request_id for s in plan.sequences} == {"x0", "y0", "w0", "x1", "w1"}
    made.commit(plan, arena.run(plan))
    step(made, arena)
    assert (made.begin_load(), list(made.pool.going)) == ("z", ["y"])


def test_younger_requests_go_on_beside_one_whose_adapter_may_not_act_yet():
    made, arena = scheduler(n_pages=23, n_acting=2), TokenArena(3)
    for name in "xyz":
        made.pool.bind(name, AdapterVersion(id=name, folder=name))
    load(made.pool, "x", "y", "z")
    made.add(request("x0", version="x", longest=5)), made.add(request("y0", version="y", longest=3))
    step(made, arena)
    for name in "zyx":
        made.add(request(f"{name}1", version=name, longest=7))
    assert {s.request_id for s in made.plan().sequences} == {"x0", "y0", "x1"}


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
    load(pool, "x", "y")
    assert load(pool, "z") == ["x"]
    pool.enter("y"), pool.acquire("y"), pool.release("y"), pool.leave("y")
    assert load(pool, "x") == ["z"]
    pool.pin("y")
    pool.enter("x"), pool.acquire("x")
    assert pool.begin_load(["z"]) is None
    pool.release("x")
    assert load(pool, "z") == ["x"]
    assert pool.begin_load(["z", "x"]) is None  # what the older request wants stays, and y is pinned
    pool.unpin("y")
    assert (pool.begin_load(["z", "x"]), list(pool.going)) == ("x", ["y"])


def test_who_nobody_waits_for_goes_before_those_used_longer_ago():
    pool = AdapterPool(2)
    for name in "xyz":
        pool.bind(name, AdapterVersion(id=name, folder=name))
    load(pool, "x", "y")
    pool.enter("x")
    assert load(pool, "z") == ["y"]


def test_bytes_decide_where_the_number_does_not():
    """Pages in use and adapters share them; free pages give their memory up."""
    pages = Pages(10, 3, page_bytes=7)
    pool = AdapterPool(memory=pages)
    for name, n_bytes in {"x": 20, "y": 11, "z": 32}.items():
        pool.bind(name, AdapterVersion(id=name, folder=name, n_bytes=n_bytes))
    assert pages.grow("r", 4 * 3)
    load(pool, "x", "y")
    assert (pages.n_lent, pages.n_free) == (31, 1)
    assert load(pool, "z") == ["x", "y"]
    assert not pages.grow("r", 6 * 3)
    pages.release("r")
    assert (pages.lendable, pages.shed) == (38, [])
    assert load(pool, "y") == []
    assert len(pages.shed) == 1  # for the eleventh byte: ten were nobody's
    assert pages.capacity(pages.n_lent) == 3 * 3


def test_an_adapter_that_takes_more_than_was_thought():
    pages = Pages(10, 3, page_bytes=7)
    pool = AdapterPool(memory=pages)
    for name in "xy":
        pool.bind(name, AdapterVersion(id=name, folder=name, n_bytes=31))
    load(pool, "x")
    assert pool.begin_load(["y"]) == "y"
    assert pool.settle("y", 41)
    assert (list(pool.going), pages.n_lent) == (["x"], 41)
    pool.loaded("y")
    pool.pin("y")
    assert pool.begin_load(["x"]) is None
    pool.unpin("y")
    assert (pool.begin_load(["x"]), pool.settle("x", 71), pages.n_lent) == ("x", False, 0)
    assert pool.lacks_bytes("x")


def test_base_requests_do_not_take_the_bytes_that_an_older_request_waits_for():
    pages = Pages(6, 3, page_bytes=7)
    made, arena = Scheduler(pages, AdapterPool(memory=pages), Limits(max_model_len=18)), TokenArena(3)
    made.pool.bind("x", AdapterVersion(id="x", folder="x", n_bytes=35))
    made.add(request("first", n_prompt=5, longest=3))
    step(made, arena)
    made.add(request("x0", version="x"))
    for i in range(9):
        made.add(request(f"base{i}"))
        if made.begin_load() is not None:
            break
        plan = made.plan()
        assert [s.request_id for s in plan.sequences] == ["first"]
        made.commit(plan, arena.run(plan))
    assert made.pool.loading == ["x"]


def test_a_request_that_memory_will_never_hold_is_told():
    pages = Pages(6, 3, page_bytes=7)
    made = Scheduler(pages, AdapterPool(memory=pages), Limits(max_model_len=18))
    with pytest.raises(
        ConfigError, match=r"0 positions of keys and values are left .* takes 36, .* Raise kv_cache_memory_bytes"
    ):
        made.require_room(2, 0, 36)
    assert made.require_room(2, 1, 20) == 9 - 3
    made.pool.bind("x", AdapterVersion(id="x", folder="x", n_bytes=43))
    made.add(request("x0", version="x"))
    assert made.begin_load() is None
    assert not made.plan().sequences
    assert made.stuck() is next(iter(made.waiting))


def test_a_preempted_request_finds_its_pages_again():
    """Seven pages: the newest gives way, and what the oldest did not need of its pages is still there."""
    made, arena = scheduler(n_pages=7), TokenArena(3)
    made.add(request("old", n_prompt=8, longest=4, root=root_of(None, "a")))
    made.add(request("new", n_prompt=9, longest=7, root=root_of(None, "b")))
    step(made, arena)
    while not made.waiting:
        step(made, arena)
    [new] = made.waiting
    assert (new.n_preempted, new.n_computed, new.n_cached) == (1, 0, 0)
    starts = []
    while made.has_work:
        plan = made.plan()
        starts += [s.start for s in plan.sequences if s.request_id == "new"]
        made.commit(plan, arena.run(plan))
    assert (starts[0], len(new.output)) == (9, 7)
    assert (new.n_cached, made.pages.n_held) == (0, 0)  # what it had found when it began; and nothing is held


def test_a_request_that_waits_for_pages_takes_none_in_vain():
    """Nine pages: four are cached, the batch has five, and the next request needs those four and two more."""
    made, arena = scheduler(n_pages=9), TokenArena(3)
    made.add(request("before", n_prompt=12, longest=1, root=root_of(None, "a")))
    step(made, arena)
    made.add(request("now", n_prompt=8, longest=8, root=root_of(None, "b")))
    step(made, arena)
    assert (made.pages.n_cached, made.pages.n_held) == (4, 3)
    for _ in range(4):
        step(made, arena)
    taken, take = [], made.sharing.take

    def counting(request):
        taken.append(request.id)
        take(request)

    made.sharing.take = counting
    again = request("again", n_prompt=16, longest=2, root=root_of(None, "a"))
    made.add(again)
    n_steps, least = 0, made.pages.least
    while made.running:
        assert (taken, made.pages.n_cached, made.pages.least) == ([], 4, least)
        step(made, arena)
        n_steps += 1
    assert n_steps > 2
    assert again in made.waiting
    while made.has_work:
        step(made, arena)
    assert (taken, again.n_cached, len(again.output)) == (["again"], 12, 2)


def test_who_waits_for_a_block_goes_on_when_its_writer_fails():
    """The header is computed for one at a time; what a failed one computed is not shared."""
    made, arena = scheduler(n_pages=20, max_batched_tokens=13), TokenArena(3)
    for name in "abc":
        made.add(request(name, n_prompt=11, longest=4, root=root_of(None)))
    plan = made.plan()
    assert ([s.request_id for s in plan.sequences], list(made.waiting), made.sharing.n_parked) == (["a"], [], 2)
    made.commit(plan, Sampled(failed={"a": NonFiniteError("x")}))
    plan = made.plan()
    assert [(s.request_id, s.start) for s in plan.sequences] == [("b", 0)]
    made.commit(plan, arena.run(plan))
    assert {(s.request_id, s.start) for s in made.plan().sequences} == {("b", 11), ("c", 9)}
    assert {r.id: r.n_cached for r in made.running} == {"b": 0, "c": 9}


def test_two_names_of_equal_content_are_one_version_and_forgetting_one_keeps_it():
    pool = AdapterPool()
    version = AdapterVersion(id="same", folder="x")
    pool.bind("one", version), pool.bind("two", version), load(pool, "same")
    pool.forget("one"), pool.tidy()
    assert (pool.resident, list(pool.going), list(pool.names)) == (["same"], [], ["two"])
    pool.forget("two"), pool.tidy()
    assert (pool.resident, list(pool.going)) == ([], ["same"])


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
    assert [inbox.take() for _ in range(3)] == [3, 5, None]
    assert not inbox.wait(0)


def test_a_table_is_the_same_tuple_until_it_changes():
    pages = Pages(9, 3)
    assert pages.table("r") == ()
    pages.grow("r", 5)
    first = pages.table("r")
    assert len(first) == 2
    pages.grow("r", 6)
    assert pages.table("r") is first
    pages.grow("r", 7)
    assert pages.table("r")[:2] == first
    assert len(pages.table("r")) == 3
    pages.release("r")
    assert pages.table("r") == ()


def drafting(made, arena, *names, longest=40, n_prompt=2, guesses=None):
    """Requests that decode and guess seven tokens, all of them right."""
    for name in names:
        made.add(request(name, n_prompt=n_prompt, longest=longest))
        step(made, arena)
        made.running[-1].draft = guesses or Guesses(7, 100)
    return made.running


def test_a_draft_gives_the_answer_in_fewer_steps():
    made, arena = scheduler(n_pages=23), TokenArena(3)
    (one,) = drafting(made, arena, "a", longest=24)
    rows = []
    while made.has_work:
        plan = made.plan()
        rows.append((plan.sequences[0].start, plan.n_tokens))
        made.commit(plan, arena.run(plan))
    assert one.output == answer_alone(one)
    assert rows == [(2, 8), (10, 8), (18, 7)]  # the last draws the 24th token


def test_pages_behind_a_rejected_token_are_free_and_what_was_drawn_is_published():
    made, arena = scheduler(n_pages=23, block=3), TokenArena(3)
    (one,) = drafting(made, arena, "a", guesses=Guesses(7, 4), n_prompt=5)
    one.root = root_of(None)
    step(made, arena)
    assert (one.n_computed, one.n_left) == (5 + 4, 1)  # three of the seven were right
    assert len(made.pages.table("a")) == made.pages.needed(9)
    assert one.n_published == 3
    keys = one.keys(3, 3)
    assert made.pages.n_found(keys) == 3
    assert [arena.slots[page * 3 + i][1] for page in made.pages.table("a") for i in range(3)] == list(one.tokens(0, 9))


def test_few_rows_are_tried_and_none_beside_a_prompt_that_is_read():
    made, arena = scheduler(n_pages=150, max_batched_tokens=99), TokenArena(3)
    drafting(made, arena, "a")
    assert [len(s.tokens) for s in made.plan().sequences] == [8]
    drafting(made, arena, "b", "c")
    assert [len(s.tokens) for s in made.plan().sequences] == [5, 5, 6]  # sixteen rows
    made.add(request("d", n_prompt=5))
    plan = made.plan()
    assert [(s.request_id, len(s.tokens)) for s in plan.sequences] == [("a", 1), ("b", 1), ("c", 1), ("d", 5)]
    made.commit(plan, arena.run(plan))
    assert sum(len(s.tokens) for s in made.plan().sequences) == 13  # one of four guesses nothing
    for i in range(13):
        made.add(request(f"e{i}"))
    step(made, arena)
    assert all(len(s.tokens) == 1 for s in made.plan().sequences)
    assert made.plan().n_tokens == 17


def test_the_budget_of_a_step_holds_for_drafts():
    made, arena = scheduler(n_pages=23, max_batched_tokens=5), TokenArena(3)
    drafting(made, arena, "a")
    assert made.plan().n_tokens == 5


def test_no_page_is_taken_from_anybody_for_a_draft():
    made, arena = scheduler(n_pages=4, block=3, max_model_len=9), TokenArena(3)
    drafting(made, arena, "a", "b", longest=7)
    made.running[0].draft = made.running[1].draft = None
    while made.running[0].n_positions < 6:
        step(made, arena)
    made.running[0].draft = Guesses(7, 100)
    assert (made.pages.n_free, made.n_preemptions) == (0, 0)
    assert [len(s.tokens) for s in made.plan().sequences] == [1, 1]
    assert made.n_preemptions == 0


def test_no_cached_page_goes_out_for_a_draft():
    """As much is tried as the last page has room for."""
    made, arena = scheduler(n_pages=3, block=5, max_model_len=15), TokenArena(5)
    made.pages.grow("ended", 10)
    made.pages.publish("ended", [b"one", b"two"], 0)
    made.pages.release("ended")
    (one,) = drafting(made, arena, "a", longest=12)
    assert (one.n_positions, made.pages.n_free, made.pages.n_cached) == (3, 0, 2)
    assert [s.n_drafted for s in made.plan().sequences] == [2]
    assert made.pages.n_cached == 2


def test_nothing_is_tried_while_it_must_be_seen_how_long_decoding_takes():
    """Prompts that arrive beside a stream wait for that, and a step with a draft does not tell it."""
    made, arena = scheduler(n_pages=50, max_batched_tokens=99), TokenArena(3)
    (one,) = drafting(made, arena, "a")
    one.streams = True
    made.add(request("b", n_prompt=5))
    plan = made.plan()
    assert [(s.request_id, len(s.tokens)) for s in plan.sequences] == [("a", 1)]
    made.commit(plan, arena.run(plan))
    made.pace.observe(1, 0, 0.1)
    plan = made.plan()
    assert [(s.request_id, len(s.tokens)) for s in plan.sequences] == [("a", 1), ("b", 5)]
    made.commit(plan, arena.run(plan))
    made.pace.observe(1, 5, 0.1)
    plan = made.plan()
    assert [(s.request_id, len(s.tokens)) for s in plan.sequences] == [("a", 1), ("b", 1)]  # two have not been seen
    made.commit(plan, arena.run(plan))
    made.pace.observe(2, 0, 0.1)
    assert sum(s.n_drafted for s in made.plan().sequences) == 7
