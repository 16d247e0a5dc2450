"""Successive halving against what it is on paper, and its laws whatever the order in which members arrive."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from veneer.train.sweep.asha import Standing, divisor, n_rungs, promotions
from veneer.train.sweep.course import next_pack


def test_there_are_as_many_rungs_as_leave_few_members() -> None:
    assert [n_rungs(n, 3) for n in (1, 2, 4, 8, 9, 26, 27)] == [0, 1, 1, 1, 2, 2, 3]
    assert [divisor(stretch, 2, 3) for stretch in range(3)] == [9, 3, None]


def test_a_member_goes_on_once_it_is_among_the_best_of_those_that_have_arrived() -> None:
    standings = {name: Standing() for name in "abcdefg"}
    for name, loss in zip("gfe", (3.0, 2.0, 5.0), strict=True):
        assert promotions(standings, 1, 3) == []
        standings[name] = Standing((loss,))
    assert promotions(standings, 1, 3) == ["f"]  # one of three
    standings["f"] = replace(standings["f"], granted=2)
    standings |= {"a": Standing((1.0,)), "b": Standing((1.0,)), "c": Standing(over=True)}
    assert promotions(standings, 1, 3) == ["a"]  # five of six are there: still one, the first of equals
    standings["a"] = replace(standings["a"], granted=2)
    assert promotions(standings, 1, 3) == []
    standings["d"] = Standing((9.0,))
    assert promotions(standings, 1, 3) == ["b"]  # the last: two of six


@st.composite
def sweeps(draw: st.DrawFn) -> tuple[list[list[float]], int, int, int]:
    n = draw(st.integers(1, 31))
    losses = draw(st.lists(st.lists(st.floats(0, 9), min_size=5, max_size=5), min_size=n, max_size=n))
    return losses, draw(st.integers(2, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 7))


@given(sweeps(), st.randoms(use_true_random=False))
def test_whatever_the_order_the_best_reach_their_ends_and_few_others(drawn: tuple, random) -> None:
    """Packs on several workers end in any order; the same standings on disk give the same promotions."""
    losses, reduction, n_workers, n_places = drawn
    rungs = n_rungs(len(losses), reduction)
    standings = {f"m{i}": Standing() for i in range(len(losses))}
    packs: list[list[str]] = []
    while True:
        for name in promotions(standings, rungs, reduction):
            standings[name] = replace(standings[name], granted=standings[name].granted + 1)
        assert promotions(standings, rungs, reduction) == []
        busy = {name for pack in packs for name in pack}
        while n_workers > len(packs):
            waiting = {n: len(s.losses) for n, s in standings.items() if s.trains and n not in busy}
            if not waiting:
                break
            packs.append(next_pack(waiting, n_workers - len(packs), n_places))
            assert 0 < len(packs[-1]) <= n_places
            assert set(packs[-1]) <= set(waiting)
            busy |= set(packs[-1])
        if not packs:
            break
        for name in packs.pop(random.randrange(len(packs))):
            stretch = len(standings[name].losses)
            if stretch == rungs:
                standings[name] = replace(standings[name], over=True)
            else:
                loss = losses[int(name[1:])][stretch]
                standings[name] = replace(standings[name], losses=(*standings[name].losses, loss))
    finished = [name for name, each in standings.items() if each.over]
    assert finished
    for rung in range(rungs):
        there = [n for n, s in standings.items() if len(s.losses) > rung]
        beyond = [n for n in there if standings[n].granted > rung + 1]
        share = -(-len(there) // reduction)
        assert len(beyond) >= share
        best = sorted(there, key=lambda n: standings[n].losses[rung])[:share]
        assert set(best) <= set(beyond)  # whoever has gone on early, the best are among them


@given(st.integers(1, 40), st.integers(2, 5))
def test_in_one_pack_it_is_successive_halving(n: int, reduction: int) -> None:
    rungs = n_rungs(n, reduction)
    standings = {f"m{i}": Standing() for i in range(n)}
    for rung in range(rungs):
        left = [name for name, each in standings.items() if each.trains]
        standings |= {m: replace(standings[m], losses=(*standings[m].losses, -float(m[1:]))) for m in left}
        found = promotions(standings, rungs, reduction)
        assert found == sorted(left, key=lambda m: -int(m[1:]))[: -(-len(left) // reduction)]
        standings |= {m: replace(standings[m], granted=rung + 2) for m in found}
    assert 1 <= len(found if rungs else standings) < reduction + 1


def test_members_are_shared_out_among_idle_workers() -> None:
    waiting = dict.fromkeys("abcde", 0) | {"d": 1}
    assert next_pack(waiting, 2, 9) == ["d", "a", "b"]
    assert next_pack(waiting, 1, 4) == ["d", "a", "b", "c"]
