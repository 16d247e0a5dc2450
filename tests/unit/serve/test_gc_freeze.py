"""Python's collector under an engine that runs: what stays is frozen, and circles in it are found at rest."""

from __future__ import annotations

import gc
import json
import weakref

import pytest

from veneer.serve.gc_freeze import _LOADS, GcFreeze


class Circle:
    def __init__(self) -> None:
        self.own = self


@pytest.fixture
def collector():
    gc.unfreeze()
    made = GcFreeze()
    yield made
    made.stop()


def test_objects_are_frozen_from_the_start_on_and_as_adapters_settle(collector):
    before = gc.get_freeze_count()
    collector.settle()
    assert gc.get_freeze_count() == before
    collector.start()
    at_start = gc.get_freeze_count()
    assert at_start > before + 1000
    kept = [[i] for i in range(500)]
    for _ in range(_LOADS - 1):
        collector.settle()
    assert gc.get_freeze_count() <= at_start
    collector.settle()
    assert gc.get_freeze_count() > at_start + len(kept) - 100
    collector.stop()
    assert gc.get_freeze_count() == 0


def test_circles_that_were_frozen_are_found_at_rest(collector):
    collector.start()
    circle = Circle()
    seen = weakref.ref(circle)
    for _ in range(_LOADS):
        collector.settle()
    del circle
    gc.collect()
    assert seen() is not None
    collector.rest()
    assert seen() is None


def test_many_new_lists_cause_no_look_through_everything(collector):
    before = gc.get_threshold()
    kept = [[] for _ in range(20_000)]
    collector.start()
    looks = gc.get_stats()[2]["collections"]
    kept += json.loads(b"[" + b"[]," * 200_000 + b"[]]")
    assert gc.get_stats()[2]["collections"] == looks
    collector.stop()
    assert gc.get_threshold() == before
