"""Samples of the largest products of parameters: `make test` runs a sample, and `make test-all`, as CI does, more.

In Triton's interpreter, which takes a thousand times as long as a kernel, every two values of two parameters meet in a
case: kernels have no branch that three of them decide. On the CPU's kernels every case runs.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import looping


def without_repeats(items: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Return the cases to run, and those in Triton's interpreter of which every two values meet in others."""
    left = {
        id(item)
        for (_, backend), cases in _products(items).items()
        if backend == "triton"
        for item in _beyond(cases, sample([_given_together(case) for case in cases], 2))
    }
    return [item for item in items if id(item) not in left], [item for item in items if id(item) in left]


def mark_full(items: Sequence[Any]) -> None:
    """Mark ``full`` the cases beyond the sample: of tests marked ``product``, and of all in Triton's interpreter."""
    for cases in _products(items).values():
        for item in _beyond(cases, sample([_given(case) for case in cases])):
            item.add_marker("full")


def _products(items: Sequence[Any]) -> Mapping[tuple[str, object], list[Any]]:
    products: dict[tuple[str, object], list[Any]] = defaultdict(list)
    for item in items:
        if hasattr(item, "callspec"):
            backend = item.callspec.params.get("backend")
            if backend == "triton" or item.get_closest_marker("product"):
                products[item.nodeid.partition("[")[0], backend].append(item)
    return products


def _beyond(items: Sequence[Any], kept: set[int]) -> list[Any]:
    return [item for place, item in enumerate(items) if place not in kept]


def _given(item: Any) -> dict[str, int]:
    """The values of an item's parameters."""
    return {name: id(value) for name, value in item.callspec.params.items()}


def _given_together(item: Any) -> dict[tuple[str, ...], tuple[int, ...]]:
    """As `_given`; parameters that one decorator gives are one."""
    given, found = _given(item), {}
    for mark in (mark for name in ("parametrize", "looped") for mark in item.iter_markers(name)):
        names = looping.names_of(mark)
        found[tuple(names)] = tuple(given.pop(name) for name in names)
    return found | {(name,): (value,) for name, value in given.items()}


def sample(cases: Sequence[Mapping[Any, Hashable]], strength: int = 1) -> set[int]:
    """Return the places of few cases in which every value of every parameter is, or every ``strength`` of them meet."""
    met = [set(itertools.combinations(sorted(case.items()), min(strength, len(case)))) for case in cases]
    missing, kept = set[Any]().union(*met), set[int]()
    while missing:
        best = max(range(len(cases)), key=lambda place: len(missing & met[place]))
        kept.add(best)
        missing -= met[best]
    return kept
