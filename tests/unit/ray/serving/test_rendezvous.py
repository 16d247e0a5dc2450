"""Homes of names among replicas: laws of the order, of the bound and of the shares."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.ray.serving.rendezvous import Traffic, bound, order, ranking

NAMES = st.text("abcä\0", max_size=3)
LOADS = st.dictionaries(st.text("xyz", min_size=1, max_size=3), st.integers(0, 60), min_size=1, max_size=7)
REPLICAS = list("abcdef")


@given(NAMES, st.sets(NAMES, min_size=2, max_size=7))
def test_a_replica_that_goes_leaves_the_order_of_the_others(name, replicas):
    ranked = ranking(name, replicas)
    assert set(ranked) == replicas
    for gone in replicas:
        assert ranking(name, replicas - {gone}) == [replica for replica in ranked if replica != gone]


def test_first_homes_are_spread_evenly_and_second_homes_too():
    for rank in (0, 1):
        counts = Counter(ranking(f"adapter-{n}", REPLICAS)[rank] for n in range(1000))
        assert all(120 < counts[replica] < 214 for replica in REPLICAS)  # of a fair die: 167 ± 12


def test_half_of_a_surrogate_pair_is_a_name():
    assert ranking("\ud800", ["a\udfff", "b"])


@given(NAMES, LOADS, st.integers(1, 9))
def test_the_order_has_every_replica_and_begins_below_the_bound(name, loads, n_homes):
    found, most = order(name, loads, n_homes), bound(loads)
    assert sorted(found) == sorted(loads)
    assert loads[found[0]] < most
    is_full = [loads[replica] >= most for replica in found]
    assert is_full == sorted(is_full)  # those at the bound come last
    homes = ranking(name, loads)[:n_homes]
    with_room = [replica for replica in homes if loads[replica] < most]
    if with_room:
        assert found[0] in with_room
        assert loads[found[0]] == min(loads[replica] for replica in with_room)
    else:
        assert found[0] == next(replica for replica in ranking(name, loads) if loads[replica] < most)


@given(st.lists(NAMES, min_size=1, max_size=300), st.integers(2, 6))
def test_no_replica_is_filled_beyond_the_bound(names, n_replicas):
    loads = dict.fromkeys(REPLICAS[:n_replicas], 0)
    for name in names:
        chosen, most = order(name, loads, 1)[0], bound(loads)
        loads[chosen] += 1
        assert loads[chosen] <= most


def test_a_few_requests_stay_in_one_home_and_many_go_on_to_the_next():
    loads = dict.fromkeys(REPLICAS, 0)
    first, second, *_ = ranking("x", loads)
    for _ in range(8):
        assert order("x", loads, 1)[0] == first
        loads[first] += 1
    assert order("x", loads, 1)[0] == second


def test_a_hot_name_gets_homes_by_its_share_and_loses_them():
    traffic = Traffic()
    for n in range(2000):
        traffic.add("hot" if n % 2 else f"cold-{n}")
    assert traffic.share("hot") == pytest.approx(0.5, abs=0.02)
    assert [traffic.n_homes("hot", n) for n in (1, 2, 3, 10)] == [1, 2, 3, 10]
    assert traffic.n_homes("cold-1998", 10) == 1
    for _ in range(512):
        traffic.add("other")
    assert traffic.share("hot") == pytest.approx(0.125, abs=0.01)
    assert traffic.n_homes("hot", 10) == 5


def test_no_name_is_hot_before_there_is_traffic():
    traffic = Traffic()
    traffic.add("first")
    assert (traffic.n_homes("first", 10), traffic.n_homes("unknown", 10)) == (1, 1)


@given(st.lists(st.sampled_from("abcdefg"), max_size=1500))
def test_shares_are_at_most_the_whole(names):
    traffic = Traffic()
    for name in names:
        traffic.add(name)
    assert sum(map(traffic.share, "abcdefg")) <= 1 + 1e-9


def test_names_that_come_once_are_forgotten():
    traffic = Traffic()
    for n in range(20_000):
        traffic.add(str(n))
    assert len(traffic._counts) <= 1024


def test_forty_adapters_on_two_replicas_with_room_for_25_each_are_mostly_found_loaded():
    names, weights = [f"adapter-{n}" for n in range(40)], [1 / (1 + n) for n in range(40)]
    for hot in (0.0, 0.5):
        draw, traffic, in_flight, n_hits = random.Random(7), Traffic(), list[str](), 0
        loads = dict.fromkeys(["a", "b"], 0)
        loaded = {replica: OrderedDict[str, None]() for replica in loads}
        of_hot = Counter[str]()
        for _ in range(2000):
            if len(in_flight) == 16:
                loads[in_flight.pop(draw.randrange(16))] -= 1
            name = names[3] if draw.random() < hot else draw.choices(names, weights)[0]
            traffic.add(name)
            chosen = order(name, loads, traffic.n_homes(name, 2))[0]
            in_flight.append(chosen)
            loads[chosen] += 1
            n_hits += name in loaded[chosen]
            loaded[chosen][name] = None
            loaded[chosen].move_to_end(name)
            if len(loaded[chosen]) > 25:
                loaded[chosen].popitem(last=False)
            of_hot[chosen] += name == names[3]
        assert n_hits / 2000 > 0.95
        if hot:
            assert min(of_hot.values()) > 0.25 * sum(of_hot.values())
