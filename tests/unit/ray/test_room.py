"""Members that share a base in the memory of one worker."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from veneer.plan.live_bytes import Peak
from veneer.plan.memory_trace import ACTIVATIONS, ADAPTERS, BASE, HEAD, LOGITS
from veneer.plan.report import FRAGMENTS
from veneer.ray.room import places_of


@given(st.integers(1, 10**11), st.integers(1, 10**9), st.integers(0, 10**12))
def test_the_base_counts_once(base: int, own: int, free: int) -> None:
    kinds = {BASE: base, HEAD: base // 7, ADAPTERS: own, ACTIVATIONS: 3 * own, LOGITS: own}
    n = places_of(cast(Any, SimpleNamespace(peak=Peak(kinds))), free)

    def taken(members: int) -> float:
        return FRAGMENTS * (base + base // 7 + members * 5 * own)

    assert n == 1 or taken(n) <= free + 2 * n
    assert taken(n + 1) >= free - 2 * n - 2
