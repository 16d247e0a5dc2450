"""Places of refused clients: nobody is told the second of another's place."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from veneer.serve.schedule.return_places import ReturnPlaces


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=50.0)
    monkeypatch.setattr("veneer.serve.schedule.return_places.monotonic", lambda: clock.now)
    return clock


def test_each_client_has_its_place_behind_those_told_before(clock):
    places = ReturnPlaces()
    assert [places.seconds(n, 19, lambda ahead: 7 + ahead) for n in (3, 2, 5)] == [7, 10, 12]


def test_places_are_given_again_when_there_are_too_many(clock):
    places = ReturnPlaces()
    told = [places.seconds(3, 5, lambda ahead: 7 + ahead) for _ in range(9)]
    assert told == [7, 10, 13, 16, 19, 22, 25, 7, 10]


def test_places_are_free_once_all_clients_are_due(clock):
    places = ReturnPlaces()
    assert [places.seconds(1, 19, lambda ahead: 7 + ahead) for _ in range(3)] == [7, 8, 9]
    clock.now += 8.5
    assert places.seconds(1, 19, lambda ahead: 7 + ahead) == 10
    clock.now += 10
    assert places.seconds(1, 19, lambda ahead: 7 + ahead) == 7


def test_places_are_kept_until_the_last_client_is_due(clock):
    """Also if a later client was told a shorter time, since much had ended meanwhile."""
    places = ReturnPlaces()
    assert places.seconds(3, 19, lambda ahead: 90 + ahead) == 90
    clock.now += 50
    assert places.seconds(2, 19, lambda ahead: 7 + ahead) == 10
    clock.now += 20
    assert places.seconds(1, 19, lambda ahead: 7 + ahead) == 12
    clock.now += 20
    assert places.seconds(1, 19, lambda ahead: 7 + ahead) == 7
