"""Of the largest products of parameters `make test` runs a sample, and `make test-all`, as CI does, every case."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any


def mark_full(items: Sequence[Any]) -> None:
    """Mark ``full`` the cases beyond the sample: of tests marked ``product``, and of all in Triton's interpreter."""
    products: dict[tuple[str, object], list[Any]] = defaultdict(list)
    for item in items:
        if hasattr(item, "callspec"):
            backend = item.callspec.params.get("backend")
            if backend == "triton" or item.get_closest_marker("product"):
                products[item.nodeid.partition("[")[0], backend].append(item)
    for cases in products.values():
        kept = sample([{name: id(value) for name, value in item.callspec.params.items()} for item in cases])
        for place, item in enumerate(cases):
            if place not in kept:
                item.add_marker("full")


def sample(cases: Sequence[Mapping[str, int]]) -> set[int]:
    """Return the places of few cases in which every parameter has each of its values at least once."""
    kept: set[int] = set()
    missing = {pair for case in cases for pair in case.items()}
    while missing:
        best = max(range(len(cases)), key=lambda place: len(missing & cases[place].items()))
        kept.add(best)
        missing -= cases[best].items()
    return kept
