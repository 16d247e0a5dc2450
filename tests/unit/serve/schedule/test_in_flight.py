"""Times in which what is in flight will have ended."""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from veneer.serve.schedule.in_flight import InFlight


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=50.0)
    for room in ("in_flight", "return_places"):
        monkeypatch.setattr(f"veneer.serve.schedule.{room}.monotonic", lambda: clock.now)
    return clock


def lasts(flight: InFlight, clock: SimpleNamespace, *seconds: float) -> None:
    for each in seconds:
        with flight.counted(1):
            clock.now += each


def test_amounts_are_counted_even_if_a_block_raises():
    flight = InFlight()
    with flight.counted(3):
        with pytest.raises(KeyError), flight.counted(4):
            raise KeyError(flight.n)
        assert flight.n == 3
    assert flight.n == 0


def test_each_lasts_as_those_that_lasted_longer_than_it_has(clock):
    flight = InFlight()
    lasts(flight, clock, 2, 2, 2, 20, 22, 30)
    with ExitStack() as stack:
        stack.enter_context(flight.counted(16))
        clock.now += 5.5  # longer than the short ones: 22 in all, 16.5 from here
        stack.enter_context(flight.counted(3))  # between the short and the long: 11
        assert [flight.seconds(n) for n in (1, 3, 4, 19)] == [11, 11, 17, 17]


def test_what_outlasts_all_is_thought_to_go_on_half_as_long_again(clock):
    flight = InFlight()
    lasts(flight, clock, 4)
    with flight.counted(2):
        clock.now += 40
        assert flight.seconds(1) == 20
        clock.now += 10_000
        assert flight.seconds(2) == 600


def test_the_first_request_and_nothing_in_flight_say_a_second(clock):
    flight = InFlight()
    assert flight.seconds(1) == 1
    with flight.counted(1):
        assert flight.seconds(1) == 1


def test_refused_clients_are_told_seconds_at_which_each_has_a_place(clock):
    flight = InFlight()
    lasts(flight, clock, 21, 21, 21)
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(flight.counted(2))
            clock.now += 5
        # Two places are free in 6, 11 and 16 s, and then again a turn of 16 s later.
        assert [flight.refused(1, 6) for _ in range(8)] == [6, 6, 11, 11, 16, 16, 22, 22]
        assert [flight.refused(1, 6) for _ in range(17)][-2:] == [16 * 4, 6]
        clock.now += 10_000
        assert flight.refused(1, 6) == 600


def test_clients_that_return_when_they_were_told_have_the_first_place_again(clock):
    flight = InFlight()
    lasts(flight, clock, 8)
    with flight.counted(3):
        told = [flight.refused(1, 3) for _ in range(2)]
        clock.now += 3
        assert (told, flight.refused(1, 3)) == ([8, 8], 5)
