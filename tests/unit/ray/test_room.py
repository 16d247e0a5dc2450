"""Members that share a base in the memory of one worker."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.plan.draw import ENGINE
from veneer.plan.live_bytes import Peak
from veneer.plan.memory_trace import ACTIVATIONS, ADAPTERS, BASE, HEAD, LOGITS
from veneer.plan.report import FRAGMENTS
from veneer.ray import room
from veneer.ray.room import n_places, places_of
from veneer.recipe.recipe import parse_recipe
from veneer.train.sweep.recipe import Member


@given(st.integers(1, 10**11), st.integers(1, 10**9), st.integers(0, 10**12))
def test_the_base_counts_once(base: int, own: int, free: int) -> None:
    kinds = {BASE: base, HEAD: base // 7, ADAPTERS: own, ACTIVATIONS: 3 * own, LOGITS: own}
    n = places_of(cast(Any, SimpleNamespace(peak=Peak(kinds))), free)

    def taken(members: int) -> float:
        return FRAGMENTS * (base + base // 7 + members * 5 * own)

    assert n == 1 or taken(n) <= free + 2 * n
    assert taken(n + 1) >= free - 2 * n - 2


def test_members_that_draw_answers_are_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "task": "grpo",
        "model": {"source": "base"},
        "data": {"train": "rows.jsonl"},
        "rewards": ["exact-match"],
        "output": "run",
    }
    sizes = {"short": 7, "long": 70}
    members = [
        Member(name, {}, parse_recipe({**values, "training": {"max_completion_length": n}}))
        for name, n in sizes.items()
    ]
    kinds = {BASE: 10**9, ENGINE: 10**9, ADAPTERS: 10**6}
    monkeypatch.setattr(room, "plan_recipe", lambda *_, **__: SimpleNamespace(peak=Peak(kinds)))
    monkeypatch.setattr(room, "available_bytes", lambda _: int(FRAGMENTS * (2 * 10**9 + 3.5 * 10**6)))
    assert n_places(members, 1) == (3, "a worker has memory for 3 members of the size of long")
